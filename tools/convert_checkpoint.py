"""Runs lm2_jax.convert_checkpoint."""

import _checkout  # noqa: F401

from lm2_jax.convert_checkpoint import command

if __name__ == "__main__":
    command()
