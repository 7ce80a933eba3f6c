"""Runs lm2_jax.measurements.streaming."""

import _checkout  # noqa: F401

from lm2_jax.measurements.streaming import command

if __name__ == "__main__":
    command()
