"""Runs lm2_jax.inspect_memory."""

import _checkout  # noqa: F401

from lm2_jax.inspect_memory import command

if __name__ == "__main__":
    command()
