"""Runs lm2_jax.train_tokenizer."""

import _checkout  # noqa: F401

from lm2_jax.train_tokenizer import command

if __name__ == "__main__":
    command()
