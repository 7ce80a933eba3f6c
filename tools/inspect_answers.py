"""Runs lm2_jax.inspect_answers."""

import _checkout  # noqa: F401

from lm2_jax.inspect_answers import command

if __name__ == "__main__":
    command()
