"""Checksums of arrays, by which damaged checkpoints are recognised."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32}  # by the bytes of a number


@jax.jit
def _checksum_arrays(tree: Any) -> jax.Array:
    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).reshape(-1).astype(jnp.uint32)
        weight = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1  # odd: no bit of a value is lost in the product
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def array_checksums(tree: Any) -> list[int]:
    """One 32-bit number per array, the same on any mesh: integer sums do not depend on their order."""
    return jax.device_get(_checksum_arrays(tree)).tolist()
