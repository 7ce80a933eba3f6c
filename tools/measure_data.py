"""Runs lm2_jax.measurements.data."""

import _checkout  # noqa: F401

from lm2_jax.measurements.data import command

if __name__ == "__main__":
    command()
