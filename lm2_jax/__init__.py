"""LM2, the Large Memory Model (arXiv 2502.06049), in JAX and Flax."""

from lm2_jax.checkpoint import load, load_memory

__all__ = ["load", "load_memory"]
