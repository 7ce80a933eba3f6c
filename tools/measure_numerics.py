"""Runs lm2_jax.measurements.numerics."""

import _checkout  # noqa: F401

from lm2_jax.measurements.numerics import command

if __name__ == "__main__":
    command()
