"""Causal attention in a segment whose tokens are spread over devices, along the mesh axis `context`.

The segment is cut into 2C pieces of equal length, and device i has pieces i and 2C - 1 - i: an early one, whose queries
see few keys, and a late one, whose queries see many, so that all devices have the same work. Keys and values reach the
queries of other devices in one of two ways:

    gather: every device gets all of them;
    ring: it has those of one other device at a time, and passes them on while it computes; a running softmax joins what
      it finds (Ring Attention, arXiv 2310.01889).

Axes: B lanes, S segments, T tokens (of a device in attention), N rows (segments of lanes), G kv heads, R query heads of
a kv head, H = G·R heads, K head width, D model width, C devices. Tokens are the second to last axis of arrays whose
names begin with NG.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm2_jax.model.chosen_tiles import Keys, Part, Queries, attend, attend_to_prefix, gradient, join
from lm2_jax.parallel.fsdp import BATCH_AXES, MESH_AXES

_AXIS = "context"

# --- The order of tokens ---------------------------------------------------------------------------------------------


def balanced_order(length: int, devices: int) -> np.ndarray:
    """Place in the text of each token, int [T]: the pieces of the first device, of the second, ..."""
    pieces = np.arange(length).reshape(2 * devices, -1)
    return np.stack([pieces[:devices], pieces[: devices - 1 : -1]], axis=1).reshape(-1)


def in_text_order(x_BSTD: jax.Array) -> jax.Array:
    """The same array [B,S,T,D], which has its tokens in balanced order, with them in the text's order."""

    def exchange(x_BSTD: jax.Array) -> jax.Array:
        devices = jax.lax.axis_size(_AXIS)
        holder = [*range(devices), *reversed(range(devices))]  # of each piece
        early, late = jnp.split(x_BSTD, 2, axis=2)
        is_even = jax.lax.axis_index(_AXIS) % 2 == 0  # then its early piece has an even number, else its late one
        even, odd = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
        even = jax.lax.ppermute(even, _AXIS, [(holder[2 * i], i) for i in range(devices)])
        odd = jax.lax.ppermute(odd, _AXIS, [(holder[2 * i + 1], i) for i in range(devices)])
        return jnp.concatenate([even, odd], axis=2)

    spec = PartitionSpec(BATCH_AXES, None, _AXIS)
    return jax.shard_map(exchange, in_specs=spec, out_specs=spec, axis_names=set(MESH_AXES), check_vma=False)(x_BSTD)


# --- Attention -------------------------------------------------------------------------------------------------------


def is_shared() -> bool:
    """True inside a `shard_map` whose devices share the tokens of a segment."""
    mesh = jax.sharding.get_abstract_mesh()
    return _AXIS in mesh.manual_axes and mesh.shape[_AXIS] > 1


def shared_attention(
    q_NTHK: jax.Array, k_NTGK: jax.Array, v_NTGK: jax.Array, document_NT: jax.Array, how: str
) -> jax.Array:
    """Causal attention within documents, [N,T,H,K], where `is_shared`; T are this device's tokens.

    how: gather or ring.
    """
    (N, T, H, K), G = q_NTHK.shape, k_NTGK.shape[2]
    with jax.named_scope("shared_attention"):
        scaled_NTHK = (q_NTHK / math.sqrt(K)).astype(q_NTHK.dtype)
        q_NGRTK = scaled_NTHK.reshape(N, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
        document_NT1 = document_NT[..., None]
        keys = Keys(k_NTGK.swapaxes(1, 2), v_NTGK.swapaxes(1, 2), document_NT1)
        run = {"gather": _gathered_attention, "ring": _ring_attention}[how]
        out_NGRTK = run(Queries(q_NGRTK, document_NT1), keys)
        return out_NGRTK.transpose(0, 3, 1, 2, 4).reshape(N, T, H, K)


def _places(device: jax.Array | int, length: int) -> jax.Array:
    """Places in the segment of the tokens of a device, int32 [T]."""
    early_P, late = jnp.arange(length // 2), 2 * jax.lax.axis_size(_AXIS) - 1 - device
    return jnp.concatenate([device * (length // 2) + early_P, late * (length // 2) + early_P])


def _gathered_attention(queries: Queries, own: Keys) -> jax.Array:
    """Attention to the keys of all devices, put in the text's order; [N,G,R,T,K]."""
    T = own.k_NGUK.shape[-2]

    def gather(x: jax.Array) -> jax.Array:
        halves = x[..., : T // 2, :], x[..., T // 2 :, :]
        early, late = (jax.lax.all_gather(half, _AXIS, axis=x.ndim - 2) for half in halves)
        pieces = jnp.concatenate([early, jnp.flip(late, axis=-3)], axis=-3)
        return pieces.reshape(*x.shape[:-2], -1, x.shape[-1])

    with jax.named_scope("causal_attention"):
        return attend_to_prefix(queries, jax.tree.map(gather, own), _places(jax.lax.axis_index(_AXIS), T))


@jax.custom_vjp
def _ring_attention(queries: Queries, own: Keys) -> jax.Array:
    """Attention to the keys that come round the ring, [N,G,R,T,K]."""
    return _ring_forward(queries, own)[0]


def _ring_forward(queries: Queries, own: Keys) -> tuple[jax.Array, tuple[Queries, Keys, Part]]:
    def turn(carry: tuple[Keys, Part], back: jax.Array) -> tuple[tuple[Keys, Part], None]:
        held, so_far = carry
        with jax.named_scope("half_attention"):
            part = attend(queries, held, _last_seen(back, queries))
        return (_to_next(held), join(so_far, part)), None

    with jax.named_scope("causal_attention"):
        part = attend(queries, own, _last_seen(0, queries))
    (_, whole), _ = jax.lax.scan(turn, (_to_next(own), part), _turns())
    return whole.out_NGRQK.astype(queries.q_NGRQK.dtype), (queries, own, whole)


def _ring_backward(saved: tuple[Queries, Keys, Part], d_out_NGRTK: jax.Array) -> tuple[Queries, Keys]:
    """The sums of the gradients of keys follow them round the ring, one turn behind."""
    queries, own, whole = saved
    dtype, d_out_NGRTK = d_out_NGRTK.dtype, d_out_NGRTK.astype(jnp.float32)

    def turn(carry: tuple[Keys, jax.Array, Any], back: jax.Array) -> tuple[tuple[Keys, jax.Array, Any], None]:
        held, d_q, d_held = carry
        with jax.named_scope("half_attention"):
            more_q, *more = gradient(queries, held, _last_seen(back, queries), whole, d_out_NGRTK)
        return (_to_next(held), d_q + more_q, jax.tree.map(jnp.add, _to_next(d_held), more)), None

    with jax.named_scope("causal_attention"):
        d_q, *d_own = gradient(queries, own, _last_seen(0, queries), whole, d_out_NGRTK)
    (_, d_q, d_held), _ = jax.lax.scan(turn, (_to_next(own), d_q, d_own), _turns())
    return Queries(d_q.astype(dtype), None), Keys(*(d.astype(dtype) for d in _to_next(d_held)), None)


_ring_attention.defvjp(_ring_forward, _ring_backward)


def _turns() -> jax.Array:
    """How many devices back the one is whose keys are here, turn by turn."""
    return jnp.arange(1, jax.lax.axis_size(_AXIS))


def _last_seen(back: jax.Array | int, queries: Queries) -> jax.Array:
    """Index of the last key that each query sees of those of the device so many back; -1: none; [T]."""
    T, device = queries.q_NGRQK.shape[-2], jax.lax.axis_index(_AXIS)
    other = (device - back) % jax.lax.axis_size(_AXIS)
    return jnp.searchsorted(_places(other, T), _places(device, T), side="right").astype(jnp.int32) - 1


def _to_next(tree: Any) -> Any:
    devices = jax.lax.axis_size(_AXIS)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, _AXIS, pairs), tree)
