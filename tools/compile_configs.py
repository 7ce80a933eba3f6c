"""Runs lm2_jax.measurements.configs."""

import _checkout  # noqa: F401

from lm2_jax.measurements.configs import command

if __name__ == "__main__":
    command()
