"""Runs lm2_jax.plot_run."""

import _checkout  # noqa: F401

from lm2_jax.plot_run import command

if __name__ == "__main__":
    command()
