"""Softmax attention, and the one place that chooses its implementation.

On TPUs it is JAX's splash attention, a fused kernel that never materialises the weights of a whole segment; on CPUs a
tile of queries follows the other, and elsewhere it is `jax.nn.dot_product_attention`.

Axes: B rows, T queries, U keys, H heads, G kv heads, R = H / G heads of a kv head, K head width; of a cache: Q queries,
C positions, P = R·Q queries of a kv head.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from lm2_jax.parallel.fsdp import BATCH_AXES, can_shard_batch

_REGISTER_WIDTH = 128  # lanes of a TPU's vector registers: the kernel's tiles are multiples of it
_LARGEST_TILE = 512
_SUBLANES = 8  # of those registers
_CPU_TILE = 128  # fewest queries of a tile on CPUs; up to so many are one product
_MOST_CPU_TILES = 8  # each is compiled by itself
_CACHE_TILE = 512  # cached positions that many queries attend to at once
_NO_SINK = -1e4  # log-sum-exp of no scores: weighs nothing, and is finite


def attention(
    q_BTHK: jax.Array,
    k_BUGK: jax.Array,
    v_BUGK: jax.Array,
    *,
    causal: bool = False,
    q_document_ids_BT: jax.Array | None = None,
    kv_document_ids_BU: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √K) v, softmax in float32; [B,T,H,K].

    Args:
      causal: query t attends to keys up to t; T = U.
      q_document_ids_BT, kv_document_ids_BU: int32; queries attend to the keys of their own document. None: to all.

    A query without a key gets a finite value without meaning.
    """
    with jax.named_scope("causal_attention" if causal else "full_attention"):
        if on_tpu() and has_tiles(q_BTHK.shape[1], k_BUGK.shape[1], q_BTHK.shape[3]):
            mask = (masks.CausalMask if causal else masks.FullMask)((q_BTHK.shape[1], k_BUGK.shape[1]))
            return _splash(q_BTHK, k_BUGK, v_BUGK, mask, q_document_ids_BT, kv_document_ids_BU)
        visible_BTU = None
        if q_document_ids_BT is not None:
            visible_BTU = q_document_ids_BT[:, :, None] == kv_document_ids_BU[:, None]
        if _on_cpu() and q_BTHK.shape[1] > _CPU_TILE:
            return _in_tiles(q_BTHK, k_BUGK, v_BUGK, visible_BTU, causal)
        mask = None if visible_BTU is None else visible_BTU[:, None]
        return jax.nn.dot_product_attention(q_BTHK, k_BUGK, v_BUGK, mask=mask, is_causal=causal)


def _in_tiles(
    q_BTHK: jax.Array, k_BUGK: jax.Array, v_BUGK: jax.Array, visible_BTU: jax.Array | None, causal: bool
) -> jax.Array:
    """Attention of one tile of queries after the other, each to the keys up to its last query if it is causal.

    The backward pass computes the weights again: to write them, and to read them back, costs CPUs more.
    """
    (B, T, H, K), (U, G) = q_BTHK.shape, k_BUGK.shape[1:3]
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGUK, v_BGUK = k_BUGK.swapaxes(1, 2), v_BUGK.swapaxes(1, 2)

    @jax.checkpoint
    def attend(q_BGRTK: jax.Array, k_BGUK: jax.Array, v_BGUK: jax.Array, visible_BTU: jax.Array | None) -> jax.Array:
        q_BGPK = q_BGRTK.reshape(B, G, -1, K)
        scores_BGPU = jnp.einsum("bgpk,bguk->bgpu", q_BGPK, k_BGUK, preferred_element_type=jnp.float32) / math.sqrt(K)
        if visible_BTU is not None:
            scores_BGRTU = scores_BGPU.reshape(*q_BGRTK.shape[:4], -1)
            scores_BGRTU = jnp.where(visible_BTU[:, None, None], scores_BGRTU, jnp.finfo(jnp.float32).min)
            scores_BGPU = scores_BGRTU.reshape(scores_BGPU.shape)
        weights_BGPU = jax.nn.softmax(scores_BGPU, axis=-1).astype(v_BGUK.dtype)
        return jnp.einsum("bgpu,bguk->bgpk", weights_BGPU, v_BGUK).reshape(q_BGRTK.shape)

    size, tiles = max(_CPU_TILE, -(-T // _MOST_CPU_TILES)), []
    for first in range(0, T, size):
        last = min(first + size, T)
        seen, visible = (last if causal else U), None
        if causal:
            visible = jnp.tril(jnp.ones((1, last - first, seen), bool), first)
        if visible_BTU is not None:
            of_document = visible_BTU[:, first:last, :seen]
            visible = of_document if visible is None else visible & of_document
        tiles.append(attend(q_BGRTK[:, :, :, first:last], k_BGUK[:, :, :seen], v_BGUK[:, :, :seen], visible))
    return jnp.concatenate(tiles, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def attention_to_cache(
    q_BQHK: jax.Array, keys_BGCK: jax.Array, values_BGCK: jax.Array, index_BQ: jax.Array
) -> jax.Array:
    """Attention to the cached positions up to the query's own, index_BQ; from C on: padding; [B,Q,H,K].

    One query, as in decoding, is two products with the cache. Several go through tiles of the cache as far as it is
    filled, with a running softmax, so the weights are never held.
    """
    (B, Q, H, K), (G, C) = q_BQHK.shape, keys_BGCK.shape[1:3]
    q_BGPK = (q_BQHK / math.sqrt(K)).reshape(B, Q, G, H // G, K).transpose(0, 2, 3, 1, 4)
    q_BGPK = q_BGPK.reshape(B, G, H // G * Q, K).astype(keys_BGCK.dtype)  # P: the queries of a kv head
    index_BP1 = jnp.tile(index_BQ, (1, H // G))[..., None]
    if H // G * Q == 1 and on_tpu():  # a single query would be multiplied without the matrix unit
        q_BGPK = jnp.pad(q_BGPK, ((0, 0), (0, 0), (0, _SUBLANES - 1), (0, 0)))

    def scores_of(keys_BGCK: jax.Array, first: jax.Array | int) -> jax.Array:
        scores_BGPC = jnp.einsum("bgpk,bgck->bgpc", q_BGPK, keys_BGCK, preferred_element_type=jnp.float32)
        visible_BPC = first + jnp.arange(keys_BGCK.shape[2]) <= index_BP1
        return jnp.where(visible_BPC[:, None], scores_BGPC, jnp.finfo(jnp.float32).min)

    def mixed(weights_BGPC: jax.Array, values_BGCK: jax.Array) -> jax.Array:
        weights_BGPC = weights_BGPC.astype(values_BGCK.dtype)
        return jnp.einsum("bgpc,bgck->bgpk", weights_BGPC, values_BGCK, preferred_element_type=jnp.float32)

    def tile(i: jax.Array, running: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        largest_BGP1, total_BGP1, sum_BGPK = running
        first = jnp.minimum(i * _CACHE_TILE, C - _CACHE_TILE)  # the last tile may overlap the one before
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, _CACHE_TILE, 2) for x in (keys_BGCK, values_BGCK))
        scores_BGPC = jnp.where(first + jnp.arange(_CACHE_TILE) < i * _CACHE_TILE, -jnp.inf, scores_of(keys, first))
        new_BGP1 = jnp.maximum(largest_BGP1, jnp.max(scores_BGPC, axis=-1, keepdims=True))
        weights_BGPC, shrunk_BGP1 = jnp.exp(scores_BGPC - new_BGP1), jnp.exp(largest_BGP1 - new_BGP1)
        total_BGP1 = total_BGP1 * shrunk_BGP1 + jnp.sum(weights_BGPC, axis=-1, keepdims=True)
        return new_BGP1, total_BGP1, sum_BGPK * shrunk_BGP1 + mixed(weights_BGPC, values)

    with jax.named_scope("cache_attention"):
        if Q == 1 or C <= _CACHE_TILE:
            out_BGPK = mixed(jax.nn.softmax(scores_of(keys_BGCK, 0), axis=-1), values_BGCK)
        else:
            filled = jnp.max(jnp.where(index_BQ < C, index_BQ + 1, 0))
            zeros_BGP1 = jnp.zeros((*q_BGPK.shape[:3], 1))
            running = (zeros_BGP1 + jnp.finfo(jnp.float32).min, zeros_BGP1, jnp.zeros(q_BGPK.shape))
            _, total_BGP1, sum_BGPK = jax.lax.fori_loop(0, (filled + _CACHE_TILE - 1) // _CACHE_TILE, tile, running)
            out_BGPK = sum_BGPK / jnp.maximum(total_BGP1, 1e-30)  # no row has read anything: no tile
        out_BGRQK = out_BGPK[:, :, : H // G * Q].reshape(B, G, H // G, Q, K).astype(q_BQHK.dtype)
        return out_BGRQK.transpose(0, 3, 1, 2, 4).reshape(B, Q, H, K)


class Sinks(NamedTuple):
    """Keys beyond the window of `window_attention`, J of them.

    Attributes:
      scores_BHTJ: float32, of `scores`.
      visible_BTJ: bool, sinks that a query attends to, all of its document.
      document_ids_BJ: int32, their documents; -1: nobody's.
      values_BJGK: their values.
    """

    scores_BHTJ: jax.Array
    visible_BTJ: jax.Array
    document_ids_BJ: jax.Array
    values_BJGK: jax.Array


def window_attention(
    q_BTHK: jax.Array,
    k_BUGK: jax.Array,
    v_BUGK: jax.Array,
    window: int,
    q_document_ids_BT: jax.Array,
    kv_document_ids_BU: jax.Array,
    sinks: Sinks | None = None,
) -> jax.Array:
    """Does what causal `attention` does, to the last `window` keys of a query's document, and to sinks; [B,T,H,K].

    The T queries stand at the last T of the U keys. One softmax goes over keys and sinks.
    """
    T, U = q_BTHK.shape[1], k_BUGK.shape[1]
    with jax.named_scope("window_attention"):
        if on_tpu() and has_tiles(T, _REGISTER_WIDTH, q_BTHK.shape[3]):  # keys are padded
            return _splash_window(q_BTHK, k_BUGK, v_BUGK, window, q_document_ids_BT, kv_document_ids_BU, sinks)
        back_TU = jnp.arange(T)[:, None] + U - T - jnp.arange(U)
        visible_BTU = q_document_ids_BT[:, :, None] == kv_document_ids_BU[:, None]
        visible_BTU &= (back_TU >= 0) & (back_TU < window)
        return masked_attention(q_BTHK, k_BUGK, v_BUGK, visible_BTU, sinks)


def masked_attention(
    q_BTHK: jax.Array, k_BUGK: jax.Array, v_BUGK: jax.Array, visible_BTU: jax.Array, sinks: Sinks | None
) -> jax.Array:
    """Attention to the keys of visible_BTU and to sinks, under one softmax; [B,T,H,K].

    It holds all weights, on any device. A query without a key gets a finite value without meaning.
    """
    if sinks is None:
        return jax.nn.dot_product_attention(q_BTHK, k_BUGK, v_BUGK, mask=visible_BTU[:, None])
    scores_BHTU = jnp.concatenate([sinks.scores_BHTJ, scores(q_BTHK, k_BUGK)], axis=-1)
    visible_BTU = jnp.concatenate([sinks.visible_BTJ, visible_BTU], axis=-1)
    v_BUGK = jnp.concatenate([sinks.values_BJGK, v_BUGK], axis=1)
    scores_BHTU = jnp.where(visible_BTU[:, None], scores_BHTU, jnp.finfo(jnp.float32).min)
    return _mix(jax.nn.softmax(scores_BHTU, axis=-1), v_BUGK)


def scores(q_BTHK: jax.Array, k_BUGK: jax.Array) -> jax.Array:
    """q kᵀ / √K, float32 [B,H,T,U]."""
    (B, T, H, K), (U, G) = q_BTHK.shape, k_BUGK.shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores_BGRTU = jnp.einsum("btgrk,bugk->bgrtu", q_BTGRK, k_BUGK, preferred_element_type=jnp.float32)
    return scores_BGRTU.reshape(B, H, T, U) / math.sqrt(K)


def _mix(weights_BHTU: jax.Array, v_BUGK: jax.Array) -> jax.Array:
    """Values by their weights, [B,T,H,K]."""
    (B, H, T, U), (G, K) = weights_BHTU.shape, v_BUGK.shape[2:]
    weights_BGRTU = weights_BHTU.astype(v_BUGK.dtype).reshape(B, G, H // G, T, U)
    return jnp.einsum("bgrtu,bugk->btgrk", weights_BGRTU, v_BUGK).reshape(B, T, H, K)


def attention_weights(
    q_BTHK: jax.Array, k_BUGK: jax.Array, visible_BTU: jax.Array, bias_B1TU: jax.Array | float = 0.0
) -> jax.Array:
    """softmax(q kᵀ / √K + bias), mean over the heads, float32 [B,T,U].

    For inspection: the fused TPU kernel never materialises these weights.
    visible_BTU: bool, keys that a query may attend to; without any, it attends to all alike.
    """
    scores_BHTU = scores(q_BTHK, k_BUGK) + bias_B1TU
    scores_BHTU = jnp.where(visible_BTU[:, None], scores_BHTU, jnp.finfo(jnp.float32).min)
    return jnp.mean(jax.nn.softmax(scores_BHTU, axis=-1), axis=1)


def _on_cpu() -> bool:
    """True if the program is compiled for CPUs; see `on_tpu`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"


def on_tpu() -> bool:
    """True if the program is compiled for TPUs: those of the mesh in use, or else JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "tpu" if device is None else device.device_kind.startswith("TPU")


def has_tiles(queries: int, keys: int, head_width: int) -> bool:
    """True if the kernel takes arrays of these sizes."""
    return queries % _REGISTER_WIDTH == 0 and keys % _REGISTER_WIDTH == 0 and head_width % 64 == 0


def _splash_window(
    q_BTHK: jax.Array,
    k_BUGK: jax.Array,
    v_BUGK: jax.Array,
    window: int,
    q_document_ids_BT: jax.Array,
    kv_document_ids_BU: jax.Array,
    sinks: Sinks | None,
) -> jax.Array:
    """`window_attention` by the kernel, whose keys have a front of padding and, with sinks, of one key a document.

    That key stands for the document's sinks: its score is the log-sum-exp of theirs, which each query brings along in
    features of its own, and its value is 1 in a feature of its own, where the kernel then returns the weight of all
    sinks together. So the kernel's own gradient is that of the one softmax.
    """
    (T, U), K = (q_BTHK.shape[1], k_BUGK.shape[1]), q_BTHK.shape[3]
    J = 0 if sinks is None else sinks.document_ids_BJ.shape[1]
    front = J + -(J + U) % _REGISTER_WIDTH
    k_BUGK, v_BUGK = (jnp.pad(x, ((0, 0), (front, 0), (0, 0), (0, 0))) for x in (k_BUGK, v_BUGK))
    kv_document_ids_BU = jnp.pad(kv_document_ids_BU, ((0, 0), (front, 0)), constant_values=-1)
    mask = masks.LocalMask((T, front + U), (window - 1, 0), front + U - T)
    if sinks is None:
        return _splash(q_BTHK, k_BUGK, v_BUGK, mask, q_document_ids_BT, kv_document_ids_BU)

    is_sink_U = np.arange(front + U) < J
    mask = mask | masks.NumpyMask(np.broadcast_to(is_sink_U, (T, front + U)).copy())
    earlier_BJJ = np.tri(J, k=-1, dtype=bool) & (sinks.document_ids_BJ[:, :, None] == sinks.document_ids_BJ[:, None])
    one_each_BJ = jnp.where(jnp.any(earlier_BJJ, axis=-1), -1, sinks.document_ids_BJ)
    kv_document_ids_BU = kv_document_ids_BU.at[:, :J].set(one_each_BJ)

    scores_BHTJ = jnp.where(sinks.visible_BTJ[:, None], sinks.scores_BHTJ, jnp.finfo(jnp.float32).min)
    total_BTH = jnp.maximum(jax.nn.logsumexp(scores_BHTJ, axis=-1), _NO_SINK).swapaxes(1, 2)
    q_BTHK = q_BTHK / math.sqrt(K)
    q_BTHX = _with_features(q_BTHK.astype(v_BUGK.dtype), jnp.stack(_bfloat16_terms(total_BTH), axis=-1))
    marks_UG1 = jnp.broadcast_to(is_sink_U[:, None, None], (*k_BUGK.shape[1:3], 1))
    marks_BUG1 = jnp.broadcast_to(marks_UG1, (len(k_BUGK), *marks_UG1.shape))
    k_BUGX, v_BUGX = _with_features(k_BUGK, jnp.repeat(marks_BUG1, 3, axis=-1)), _with_features(v_BUGK, marks_BUG1)
    out_BTHX = _splash(q_BTHX, k_BUGX, v_BUGX, mask, q_document_ids_BT, kv_document_ids_BU, scale=1.0)
    mixed_BTHK = _mix(jax.nn.softmax(scores_BHTJ, axis=-1), sinks.values_BJGK)
    return out_BTHX[..., :K] + out_BTHX[..., K : K + 1] * mixed_BTHK


def _with_features(x: jax.Array, features: jax.Array) -> jax.Array:
    """x [..., K] with features behind it and zeros behind those, up to whole registers."""
    x = jnp.concatenate([x, features.astype(x.dtype)], axis=-1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _REGISTER_WIDTH)])


def _bfloat16_terms(x: jax.Array) -> list[jax.Array]:
    """Three numbers that bfloat16 holds exactly, with the sum x up to float32's rounding."""
    terms = []
    for _ in range(3):
        terms.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))  # a cast there and back may vanish
        x = x - terms[-1]
    return terms


def _splash(
    q_BTHK: jax.Array,
    k_BUGK: jax.Array,
    v_BUGK: jax.Array,
    mask: masks.Mask,
    q_document_ids_BT: jax.Array | None,
    kv_document_ids_BU: jax.Array | None,
    scale: float | None = None,
) -> jax.Array:
    """Runs the kernel on every device for its rows and heads: XLA cannot partition a kernel by itself.

    scale: divisor of the scores; None: √K.
    """
    B, _, H, _ = q_BTHK.shape
    G = k_BUGK.shape[2]
    local = functools.partial(_local_splash, mask=mask, scale=scale or math.sqrt(q_BTHK.shape[3]))
    segment_ids = None if q_document_ids_BT is None else splash.SegmentIds(q_document_ids_BT, kv_document_ids_BU)
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}
    if math.prod(free.values()) > 1:
        lanes = BATCH_AXES if can_shard_batch(B) else None
        heads = "tensor" if "tensor" in free and H % free["tensor"] == G % free["tensor"] == 0 else None
        arrays, rows = PartitionSpec(lanes, None, heads, None), PartitionSpec(lanes, None)
        segment_id_specs = None if segment_ids is None else splash.SegmentIds(rows, rows)
        in_specs = (arrays, arrays, arrays, segment_id_specs)
        local = jax.shard_map(local, in_specs=in_specs, out_specs=arrays, axis_names=set(free), check_vma=False)
    return local(q_BTHK, k_BUGK, v_BUGK, segment_ids)


def _local_splash(
    q_BTHK: jax.Array,
    k_BUGK: jax.Array,
    v_BUGK: jax.Array,
    segment_ids: splash.SegmentIds | None,
    *,
    mask: masks.Mask,
    scale: float,
) -> jax.Array:
    B, T, H, K = q_BTHK.shape
    U, G = k_BUGK.shape[1:3]
    kernel = splash.make_splash_mqa_single_device(masks.MultiHeadMask([mask] * (H // G)), block_sizes=tile_sizes(T, U))
    q_BGHTK = (q_BTHK / scale).astype(q_BTHK.dtype).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGUK, v_BGUK = k_BUGK.transpose(0, 2, 1, 3), v_BUGK.transpose(0, 2, 1, 3)
    rows = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # over the kv heads of a row
    out_BGHTK = jax.vmap(rows)(q_BGHTK, k_BGUK, v_BGUK, segment_ids)
    return out_BGHTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def tile_sizes(queries: int, keys: int) -> splash.BlockSizes:
    """The kernel's tiles, forward and backward: the largest that divide the numbers of queries and keys."""

    def largest(length: int) -> int:
        return max(
            n for n in range(_REGISTER_WIDTH, min(length, _LARGEST_TILE) + 1, _REGISTER_WIDTH) if length % n == 0
        )

    q, kv = largest(queries), largest(keys)
    return splash.BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)
