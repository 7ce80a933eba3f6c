"""Softmax attention, and the one place that chooses its implementation.

On TPUs it is JAX's splash attention, a fused kernel that never materialises the weights of a whole segment; elsewhere
`jax.nn.dot_product_attention`. Axes: B rows, T queries, U keys, H heads, G kv heads, K head width.
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
        if _on_tpu() and _has_tiles(q_BTHK.shape[1], k_BUGK.shape[1], q_BTHK.shape[3]):
            mask = (masks.CausalMask if causal else masks.FullMask)((q_BTHK.shape[1], k_BUGK.shape[1]))
            return _splash(q_BTHK, k_BUGK, v_BUGK, mask, q_document_ids_BT, kv_document_ids_BU)
        mask = None
        if q_document_ids_BT is not None:
            mask = (q_document_ids_BT[:, :, None] == kv_document_ids_BU[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q_BTHK, k_BUGK, v_BUGK, mask=mask, is_causal=causal)


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
        if _on_tpu() and _has_tiles(T, _REGISTER_WIDTH, q_BTHK.shape[3]):  # keys are padded
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


def _on_tpu() -> bool:
    """True if the program is compiled for TPUs: those of the mesh in use, or else JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "tpu" if device is None else device.device_kind.startswith("TPU")


def _has_tiles(queries: int, keys: int, head_width: int) -> bool:
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
    kernel = splash.make_splash_mqa_single_device(masks.MultiHeadMask([mask] * (H // G)), block_sizes=_tiles(T, U))
    q_BGHTK = (q_BTHK / scale).astype(q_BTHK.dtype).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGUK, v_BGUK = k_BUGK.transpose(0, 2, 1, 3), v_BUGK.transpose(0, 2, 1, 3)
    rows = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # over the kv heads of a row
    out_BGHTK = jax.vmap(rows)(q_BGHTK, k_BGUK, v_BGUK, segment_ids)
    return out_BGHTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _tiles(queries: int, keys: int) -> splash.BlockSizes:
    def largest(length: int) -> int:
        return max(
            n for n in range(_REGISTER_WIDTH, min(length, _LARGEST_TILE) + 1, _REGISTER_WIDTH) if length % n == 0
        )

    q, kv = largest(queries), largest(keys)
    return splash.BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)
