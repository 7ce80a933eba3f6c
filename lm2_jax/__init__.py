"""LM2, the Large Memory Model (arXiv 2502.06049), in JAX and Flax."""

from __future__ import annotations

from typing import Any

__all__ = ["load", "load_memory"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `load_memory`, imported when first asked for: jax and Orbax take seconds nobody should wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lm2_jax import loading

    return getattr(loading, name)
