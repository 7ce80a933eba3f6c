"""Where arrays lie while a model runs on a mesh (data, fsdp, tensor); without a mesh, nothing here does anything.

A block runs on every chip by itself, for the chip's own lanes. Its weights lie in parts along fsdp; the block fetches
them whole once, however many segments it then goes through, and sends the sum of their gradients back once. Left to the
compiler, a loop over segments would do both for every segment. The axis `tensor` stays the compiler's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # the mesh axes that lanes are spread over


def with_logical_constraint(x: jax.Array, *axes: str | None) -> jax.Array:
    """x with its axes along those mesh axes that the rules give their logical names."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) == set(mesh.manual_axes):
        return x
    spec = [_free(mesh, axis) for axis in nn.logical_to_mesh_axes(axes)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _free(mesh: AbstractMesh, axis: Any) -> Any:
    """Of one entry of a PartitionSpec, what is still the compiler's."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return tuple(name for name in names if name not in mesh.manual_axes) or None


def can_shard_batch(num_lanes: int) -> bool:
    """Whether there is a mesh that `num_lanes` lanes can be spread over, and they are not already."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and not mesh.manual_axes and num_lanes % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


def per_device(run: Callable[..., Any], weights: Any, axes: Any, arrays: Any) -> tuple[Any, Any]:
    """run(parts, specs, arrays) -> (arrays, means) on every chip's own lanes; `fetch` makes parts whole.

    Args:
      weights: float32.
      axes: PartitionSpecs of their logical axes.
      arrays: whose first axis is that of the lanes, as that of the arrays which `run` returns.

    Returns:
      the arrays of all lanes, and the means over all chips, which have no gradient.
    """
    if not can_shard_batch(jax.tree.leaves(arrays)[0].shape[0]):
        return run(weights, jax.tree.map(lambda weight: PartitionSpec(*[None] * weight.ndim), weights), arrays)
    mesh = jax.sharding.get_abstract_mesh()
    manual = {"data", "fsdp", "tensor"} if mesh.shape["tensor"] == 1 else set(BATCH_AXES)

    def stored(weight: jax.Array, axes: PartitionSpec) -> PartitionSpec:
        spec = nn.logical_to_mesh_axes(axes)
        along = [axis == "fsdp" and size % mesh.shape[axis] == 0 for size, axis in zip(weight.shape, spec, strict=True)]
        return PartitionSpec(*("fsdp" if part else None for part in along))

    def local(parts: Any, arrays: Any) -> tuple[Any, Any]:
        arrays, means = run(parts, specs, arrays)
        return arrays, jax.lax.pmean(jax.lax.stop_gradient(means), BATCH_AXES)

    specs, lanes = jax.tree.map(stored, weights, axes), PartitionSpec(BATCH_AXES)
    split = jax.shard_map(
        local, in_specs=(specs, lanes), out_specs=(lanes, PartitionSpec()), axis_names=manual, check_vma=False
    )
    return split(weights, arrays)


def fetch(parts: Any, specs: Any, dtype: str) -> Any:
    """The whole weights that a chip has parts of; they travel in `dtype`, as do their gradients on the way back.

    They are handed out in float32, in which a loop adds up gradients.
    """

    def one(part: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "fsdp" not in spec:
            return part
        whole = jax.lax.all_gather(part.astype(dtype), "fsdp", axis=spec.index("fsdp"), tiled=True)
        return whole.astype(part.dtype)

    return jax.tree.map(one, parts, specs)
