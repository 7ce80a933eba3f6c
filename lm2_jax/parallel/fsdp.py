"""Layout of a running model's arrays on a mesh (MESH_AXES); without a mesh, nothing here has an effect.

A block runs on every device by itself, for the device's own lanes and, along `context`, its own tokens of them. Its
weights are sharded along fsdp and context; the block gathers them whole once, however many segments it then goes
through, and reduces the sum of their gradients once. Left to the compiler, a loop over segments would do both for every
segment. The axis `tensor` is left to the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")  # the mesh axes that lanes are spread over
WEIGHT_AXES = ("fsdp", "context")  # those that weights are spread over, besides tensor


def with_logical_constraint(x: jax.Array, *axes: str | None) -> jax.Array:
    """x with its axes laid along the mesh axes that the rules give for their logical names, where they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) == set(mesh.manual_axes):
        return x
    spec = [_automatic(mesh, axis, size) for axis, size in zip(nn.logical_to_mesh_axes(axes), x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _automatic(mesh: AbstractMesh, axis: Any, size: int) -> Any:
    """One PartitionSpec entry, without axes that an enclosing `shard_map` handles; None if `size` does not divide."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    free = tuple(name for name in names if name not in mesh.manual_axes)
    return free if free and size % math.prod(mesh.shape[name] for name in free) == 0 else None


def can_shard_batch(num_lanes: int) -> bool:
    """True if there is a mesh over which `num_lanes` lanes divide, and they are not sharded already."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and not mesh.manual_axes and num_lanes % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


def context_shards(num_lanes: int) -> int:
    """The number of devices that share the tokens of a segment, of windows of `num_lanes` lanes."""
    return jax.sharding.get_abstract_mesh().shape["context"] if can_shard_batch(num_lanes) else 1


def per_device(run: Callable[..., Any], weights: Any, axes: Any, arrays: Any) -> tuple[Any, Any]:
    """Runs `run` under `shard_map`: every device has its own lanes (and tokens) and its FSDP shard of the weights.

    `run(shards, specs, arrays) -> (arrays, means)` gets whole weights from `all_gather_params(shards, specs, dtype)`.

    Args:
      weights: float32.
      axes: PartitionSpecs of their logical axes.
      arrays: lanes are their first axis, and tokens the third if they have so many; so it is with all arrays that
        `run` returns.

    Returns:
      the arrays of all lanes, and the means averaged over devices, without a gradient.
    """
    if not can_shard_batch(jax.tree.leaves(arrays)[0].shape[0]):
        return run(weights, jax.tree.map(lambda weight: PartitionSpec(*[None] * weight.ndim), weights), arrays)
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(MESH_AXES) if mesh.shape["tensor"] == 1 else set(MESH_AXES) - {"tensor"}
    # gathered from one device, a weight would still be copied (XLA on CPUs, jax 0.10.2)
    shards = math.prod(mesh.shape[axis] for axis in WEIGHT_AXES)

    def stored(weight: jax.Array, axes: PartitionSpec) -> PartitionSpec:
        spec = nn.logical_to_mesh_axes(axes)
        sharded = [
            axis == WEIGHT_AXES and shards > 1 and size % shards == 0
            for size, axis in zip(weight.shape, spec, strict=True)
        ]
        return PartitionSpec(*(WEIGHT_AXES if along else None for along in sharded))

    def local(shards: Any, arrays: Any) -> tuple[Any, Any]:
        arrays, means = run(shards, specs, arrays)
        return arrays, jax.lax.pmean(jax.lax.stop_gradient(means), BATCH_AXES)

    lanes = PartitionSpec(BATCH_AXES)
    tokens = PartitionSpec(BATCH_AXES, None, "context") if mesh.shape["context"] > 1 else lanes
    specs = jax.tree.map(stored, weights, axes)
    in_specs = (specs, jax.tree.map(lambda array: tokens if array.ndim >= 3 else lanes, arrays))
    out_specs = (tokens, PartitionSpec())
    sharded = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False)
    return sharded(weights, arrays)


def all_gather_params(shards: Any, specs: Any, dtype: str) -> Any:
    """Whole weights from a device's shards; they travel in `dtype`, as do their gradients on the way back.

    They are returned in float32, in which a loop adds up gradients.
    """

    def gather(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
        if WEIGHT_AXES not in spec:
            return shard
        whole = jax.lax.all_gather(shard.astype(dtype), WEIGHT_AXES, axis=spec.index(WEIGHT_AXES), tiled=True)
        return whole.astype(shard.dtype)

    return jax.tree.map(gather, shards, specs)
