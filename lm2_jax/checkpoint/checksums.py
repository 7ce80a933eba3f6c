"""Checksums of arrays, by which damaged checkpoints are recognised."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


class DamagedError(Exception):
    """A checkpoint that cannot be read, or whose arrays are not the ones that were saved."""


@jax.jit
def _checksum_arrays(tree: Any) -> jax.Array:
    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        weight = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1  # odd: no bit of a value is lost in the product
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def array_checksums(tree: Any) -> list[int]:
    """One 32-bit number per array, the same on any mesh: integer sums do not depend on their order."""
    return jax.device_get(_checksum_arrays(tree)).tolist()


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message, for a message of our own."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no details'}"
