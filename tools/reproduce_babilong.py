"""Runs lm2_jax.reproduce_babilong."""

import _checkout  # noqa: F401

from lm2_jax.reproduce_babilong import command

if __name__ == "__main__":
    command()
