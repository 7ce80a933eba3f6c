"""Runs lm2_jax.measurements.memory."""

import _checkout  # noqa: F401

from lm2_jax.measurements.memory import command

if __name__ == "__main__":
    command()
