"""The device mesh (data, fsdp, context, tensor), and the sharding of every array over it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.config import Config
from lm2_jax.parallel.fsdp import BATCH_AXES, MESH_AXES, WEIGHT_AXES

# Batches hold NumPy arrays until they are on devices, and data does without jax: here they become a pytree.
jax.tree_util.register_dataclass(
    Batch,
    data_fields=["tokens_BST", "document_BST", "reset_BS", "targets_BST", "answers_BST"],
    meta_fields=["packed"],
)

# Logical axis of a weight or activation -> mesh axis.
RULES = (
    ("batch", BATCH_AXES),
    ("tokens", "context"),
    ("embed_of_tokens", "context"),
    ("embed", WEIGHT_AXES),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("slot_in", WEIGHT_AXES),
    ("slot_out", "tensor"),
    ("activation", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that config.mesh asks for; an axis of -1 takes the devices that the others leave.

    Raises UserError if the devices do not make up the mesh, or lanes or segments do not divide over it.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh: {asked} does not make up {len(devices)} devices; set one axis to -1 for the rest")
    lanes, shards = config.data.batch_size // config.optim.accumulation_steps, sizes["data"] * sizes["fsdp"]
    if lanes % shards:
        raise UserError(
            f"data.batch_size {config.data.batch_size} with optim.accumulation_steps "
            f"{config.optim.accumulation_steps}: {lanes} lanes do not divide over data x fsdp = {shards} devices"
        )
    shared = sizes["context"]
    for length in {stage.segment_length for stage in config.stages} if shared > 1 else ():
        if length % (2 * shared):
            raise UserError(f"mesh.context {shared}: the segment length {length} does not divide by {2 * shared}")
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_of_shape(shape, devices)
    if sizes["data"] % slices:  # slices are joined by the data-centre network, which only gradients should cross
        raise UserError(
            f"mesh.data {sizes['data']} does not divide over {slices} slices; set it to a multiple of {slices}"
        )
    within = (sizes["data"] // slices, *shape[1:])
    arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def one_device_mesh() -> Mesh:
    """The mesh of one device of this process."""
    return mesh_of_shape((1,) * len(MESH_AXES), jax.local_devices()[:1])


def mesh_of_shape(shape: tuple[int, ...], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh with so many devices along each of MESH_AXES; None: all devices."""
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Lets jitted functions see the mesh and the logical axis rules; without it constraints vanish silently."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def unbox(tree: Any) -> Any:
    """Plain arrays (or shapes) of a tree that carries logical axes; unlike flax's, adds no sharding constraint."""
    boxed = nn.LogicallyPartitioned
    return jax.tree.map(lambda x: x.value if isinstance(x, boxed) else x, tree, is_leaf=lambda x: isinstance(x, boxed))


def state_shardings(mesh: Mesh, boxed_state: Any, lane_axis: int) -> Any:
    """Shardings of a train state whose arrays are boxed with logical axes; memory leaves have lanes at `lane_axis`.

    An axis that does not divide over its mesh axis is replicated.
    """
    memory = memory_shardings(mesh, boxed_state.memory, lane_axis)
    return boxed_shardings(mesh, boxed_state).replace(memory=memory)


def boxed_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of arrays that are boxed with logical axes; arrays without a box are replicated."""

    def full(x: Any) -> Any:  # optax.partition leaves a masked, empty box for parameters of the other optimizer
        return x if jax.tree.leaves(x) else unbox(x)

    boxed = jax.tree.map(full, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    return jax.tree.map(lambda array, spec: NamedSharding(mesh, fit(mesh, spec, array.shape)), unbox(boxed), specs)


def memory_shardings(mesh: Mesh, memory: Any, lane_axis: int) -> Any:
    """Shardings of a memory, whose leaves have lanes at `lane_axis`."""
    lanes = PartitionSpec(*[None] * lane_axis, BATCH_AXES)
    return jax.tree.map(lambda array: NamedSharding(mesh, fit(mesh, lanes, array.shape)), memory)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is lanes: [B, ...] over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_lanes(mesh: Mesh, num_lanes: int) -> list[int]:
    """The lanes that this process's devices hold, in order; with one process all of them."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((num_lanes,)).values()
    return sorted({lane for (lanes,) in slices for lane in range(*lanes.indices(num_lanes))})


def to_devices(mesh: Mesh, num_lanes: int, own_rows: Batch) -> Batch:
    """The global batch [B, ...] on the devices, from the rows of `own_lanes` that every process has of it."""
    sharding = batch_sharding(mesh)
    row = {lane: row for row, lane in enumerate(own_lanes(mesh, num_lanes))}

    def spread(own: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(num_lanes)
            return own[row[first] : row[last - 1] + 1]  # a device's lanes are neighbours, and so are their rows

        return jax.make_array_from_callback((num_lanes, *own.shape[1:]), sharding, shard)

    return jax.tree.map(spread, own_rows)


def abstract_batch(mesh: Mesh, num_lanes: int, segments: int, segment_length: int, packed: bool) -> Batch:
    """Shapes and shardings of a batch of windows."""
    sharding = batch_sharding(mesh)
    zeros = Batch.zeros(num_lanes, segments, segment_length, packed)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), zeros)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def fit(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec [...] of an array of this shape; an axis that does not divide over its mesh axes is replicated."""

    def fits(size: int, axes: Any) -> bool:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    axes = tuple(spec) + (None,) * (len(shape) - len(spec))
    return PartitionSpec(*(a if fits(size, a) else None for size, a in zip(shape, axes, strict=True)))
