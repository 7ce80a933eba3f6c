"""The layout of decoding: a mesh of its own, which need not be the mesh of training.

Weights lie along `tensor` alone, by heads, feed-forward width and vocabulary, in the dtype of activations, so no step
gathers any. As many devices as divide the heads share one copy of them; the rows are spread over the copies (`data`).
Keys and values of caches and banks lie by rows and heads. The axis `fsdp` has one device: a mesh with three axes has
layouts in which XLA's partitioner exchanges rows of a product (docs/tpu.md).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm2_jax.model.decode import DecodeState, by_layer
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.edge import join_edges, split_edges
from lm2_jax.model.layers import KVCache
from lm2_jax.parallel.fsdp import BATCH_AXES
from lm2_jax.parallel.mesh import boxed_shardings, fit, mesh_of_shape, use_mesh


def decode_mesh(model: Decoder, devices: Sequence[Any]) -> Mesh:
    """The mesh (data, 1, tensor) over the devices: as long along `tensor` as all numbers of heads divide."""
    c, memory = model.spec.model, model.spec.memory
    heads = (c.num_heads, c.num_kv_heads, memory.num_heads if model.kind.num_bank_layers else 0)
    tensor = math.gcd(len(devices), *heads)
    return mesh_of_shape((len(devices) // tensor, 1, 1, tensor), devices)


def prepare(model: Decoder, params: Any) -> Any:
    """Parameters as decoding reads them, on the devices where they are: `by_layer`, laid out over `decode_mesh`.

    What is prepared already is returned as it is. The decoding functions prepare what is not at every call.
    """
    if is_prepared(model, params):
        return params
    prepared = _by_layer(model, params)
    devices = jax.tree.leaves(prepared)[0].sharding.device_set
    if len(devices) == 1:
        return prepared
    mesh = decode_mesh(model, sorted(devices, key=lambda device: device.id))
    return jax.device_put(prepared, weight_shardings(model, mesh))


def is_prepared(model: Decoder, params: Any) -> bool:
    """True for what `prepare` returns."""
    return all("0" in params[name] for name in model.stacks)


def mesh_of(arrays: Any) -> contextlib.AbstractContextManager[None]:
    """The mesh that arrays of decoding are spread over, in use: a caller may have another one, as evaluations do."""
    sharding = jax.tree.leaves(arrays)[0].sharding
    spread = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return use_mesh(sharding.mesh) if spread else contextlib.nullcontext()


def weight_shardings(model: Decoder, mesh: Mesh) -> Any:
    """Shardings of what `by_layer` returns."""

    def unstack(name: str, tree: Any) -> Any:
        if name not in model.stacks:
            return tree
        layer = jax.tree.map(lambda sharding: NamedSharding(mesh, PartitionSpec(*sharding.spec[1:])), tree)
        return {str(i): layer for i in range(model.stacks[name])}

    stacked = boxed_shardings(mesh, model.abstract_params(with_axes=True))
    return {name: unstack(name, tree) for name, tree in stacked.items()}


def state_specs(model: Decoder, mesh: Any, state: DecodeState) -> DecodeState:
    """PartitionSpecs of a state: by rows; keys and values by heads, too; what waits for a segment's end, by width."""

    def rows(tree: Any, axis: int = 0) -> Any:
        return jax.tree.map(lambda x: fit(mesh, PartitionSpec(*[None] * axis, BATCH_AXES), x.shape), tree)

    def split(tree: Any, axis: int, lane_axis: int = 0) -> Any:
        def spec(x: jax.Array) -> PartitionSpec:
            axes: list[Any] = [None] * x.ndim
            axes[lane_axis], axes[axis] = BATCH_AXES, "tensor"
            return fit(mesh, PartitionSpec(*axes), x.shape)

        return jax.tree.map(spec, tree)

    def cache(c: KVCache) -> KVCache:
        keys, values = split((c.keys_BGCK, c.values_BGCK), 1)
        return rows(c).replace(keys_BGCK=keys, values_BGCK=values, inputs_BCD=split(c.inputs_BCD, -1))

    memory, edges = split_edges(state.memory)
    return rows(state).replace(
        memory=join_edges(split(memory, -1, model.kind.lane_axis), rows(edges, model.lane_axis)),
        memory_cache=split(state.memory_cache, 1),
        caches={name: [cache(c) for c in layers] for name, layers in state.caches.items()},
    )


def lay_out(model: Decoder, state: DecodeState) -> DecodeState:
    """The state, in a jitted function, laid out over the mesh in use; without one, as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    return state if mesh.empty else jax.lax.with_sharding_constraint(state, state_specs(model, mesh, state))


_by_layer = functools.partial(jax.jit, static_argnums=0)(by_layer)
