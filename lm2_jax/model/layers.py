"""The parts of a Llama block, over any number of leading axes.

Axes: B lanes, S segments, T tokens, D model width, F feed-forward width, H heads, G kv heads, K head width.
Weights are float32, and in decoding of the dtype of activations, which is that of x. Logical axis names of the weights
("embed", "heads", "mlp", ...) are mapped to the device mesh in parallel/mesh.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lm2_jax.batch import Batch
from lm2_jax.config import ModelConfig, RopeScaling
from lm2_jax.model.attention import attention, attention_to_cache, attention_weights, on_tpu
from lm2_jax.model.context import is_shared, shared_attention
from lm2_jax.model.lora import LowRank, Weight, with_addition
from lm2_jax.parallel.fsdp import with_logical_constraint

Initializer = Callable[..., jax.Array]


@struct.dataclass
class Layout:
    """Documents and positions of the tokens that blocks see.

    Attributes:
      document_BST: int32 document ids: 0 for padding, then 1, 2, ... the documents inside a segment in order.
      position_BST: int32 RoPE position; memory tokens of rmt stand at 0, where RoPE rotates nothing.
      reset_BS: bool, the segment's first document starts here: it finds the initial memory.
      packed: static; whether document ids above 1 can occur.
      deterministic: static; no dropout.
      memory_tokens: static; how many of the last positions are memory tokens, from which a block may write its bank.
      cache_index_BST: int32, the index of a position in the arrays of `KVCache`; beyond their end for padding. None:
        segments are whole, and nothing is cached.
    """

    document_BST: jax.Array
    position_BST: jax.Array
    reset_BS: jax.Array
    packed: bool = struct.field(pytree_node=False)
    deterministic: bool = struct.field(pytree_node=False, default=True)
    memory_tokens: int = struct.field(pytree_node=False, default=0)
    cache_index_BST: jax.Array | None = None

    @classmethod
    def of(cls, batch: Batch, deterministic: bool = True) -> Layout:
        """The layout of whole segments."""
        position_BST = jnp.broadcast_to(jnp.arange(batch.tokens_BST.shape[2]), batch.tokens_BST.shape)
        return cls(batch.document_BST, position_BST, batch.reset_BS, batch.packed, deterministic)

    def reordered(self, order_T: np.ndarray) -> Layout:
        """The layout of the same tokens, taken in another order."""
        document_BST, position_BST = self.document_BST[..., order_T], self.position_BST[..., order_T]
        return self.replace(document_BST=document_BST, position_BST=position_BST)


@struct.dataclass
class KVCache:
    """Earlier positions of an unfinished segment, as a block keeps them; C positions fit, W = conv_width.

    Heads stand before positions, as products of every head want it: otherwise CPUs copy the cache for each token.

    Attributes:
      keys_BGCK, values_BGCK: of self-attention.
      inputs_BCD: x', from which the bank will be written; None without a bank, or if the kind decodes in place.
      tail_BWD: the last W - 1 inputs of the convolution; None without one.
    """

    keys_BGCK: jax.Array
    values_BGCK: jax.Array
    inputs_BCD: jax.Array | None
    tail_BWD: jax.Array | None

    def append(self, k_BQGK: jax.Array, v_BQGK: jax.Array, index_BQ: jax.Array) -> KVCache:
        """The cache with keys and values of Q new positions; see `write_at`."""
        return self.replace(
            keys_BGCK=write_at(self.keys_BGCK, k_BQGK.swapaxes(1, 2), index_BQ),
            values_BGCK=write_at(self.values_BGCK, v_BQGK.swapaxes(1, 2), index_BQ),
        )


def write_at(array: jax.Array, new: jax.Array, index_BQ: jax.Array) -> jax.Array:
    """array [B,C,D] or [B,G,C,K] with `new` [B,Q,D] or [B,G,Q,K] written at index_BQ; an index beyond C is dropped."""
    (B, C), new = (array.shape[0], array.shape[-2]), new.astype(array.dtype)
    row_B1 = jnp.arange(B)[:, None]
    if array.ndim == 3:
        return array.at[row_B1, index_BQ].set(new, mode="drop")
    if index_BQ.shape[1] == 1 and on_tpu():  # a scatter copies narrow heads to another layout and back
        return jnp.where((jnp.arange(C) == index_BQ)[:, None, :, None], new, array)
    head_G1 = jnp.arange(array.shape[1])[:, None]
    return array.at[row_B1[:, None], head_G1, index_BQ[:, None]].set(new, mode="drop")


def linear_init(axes: tuple[str | None, ...], scale: float = 1.0) -> Initializer:
    """Initialiser of a weight [in, out], normal with variance scale / in, with its logical axes."""
    initializer = nn.initializers.variance_scaling(scale, "fan_in", "normal", in_axis=0, out_axis=1)
    return nn.with_logical_partitioning(initializer, axes)


def vector(value: float, axis: str | None) -> Initializer:
    """Initialiser of a constant vector, with its logical axis."""
    return nn.with_logical_partitioning(nn.initializers.constant(value), (axis,))


def dense(x: jax.Array, weight: Weight) -> jax.Array:
    """x [..., in] times weight [in, out], in x's dtype; a low-rank addition is multiplied factor by factor."""
    if isinstance(weight, LowRank):
        return dense(x, weight.weight) + weight.scale * dense(dense(x, weight.a), weight.b)
    rows = x if on_tpu() else x.reshape(-1, x.shape[-1])  # as a matrix XLA copies less on CPUs, and more on TPUs
    return (rows @ weight.astype(x.dtype)).reshape(*x.shape[:-1], weight.shape[1])


def replicated_dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`dense`, with the result's last axis whole on every device.

    Left to the compiler (jax 0.10.2), that axis lies along the mesh axis `tensor`, and with data, fsdp and tensor all
    above 1 the gradients of a loop over segments come out wrong (tests/test_step.py holds them right).
    """
    y = dense(x, weight)
    return with_logical_constraint(y, *[None] * y.ndim)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) · scale over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


def of_length_1(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / sqrt(sum(x²) + eps) over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] to the same shape."""
        return rms_norm(x, self.param("scale", vector(1.0, "norm"), x.shape[-1:]), self.eps)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Radians per position, float32 [K/2]: theta^(-2i/K), with Llama-3's scaling of low frequencies if given."""
    frequencies_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies_K
    turns_K = scaling.original_max_position_embeddings * frequencies_K / (2 * math.pi)
    keep_K = (turns_K - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep_K = jnp.clip(keep_K, 0.0, 1.0)
    return frequencies_K * (keep_K + (1 - keep_K) / scaling.factor)


def rotate(x_BTHK: jax.Array, position_BT: jax.Array, frequencies_K: jax.Array) -> jax.Array:
    """Rotary position embedding, rotate-half form: feature i pairs with feature i + K/2."""
    angle_BT1K = position_BT[..., None, None].astype(jnp.float32) * frequencies_K
    cos, sin = jnp.cos(angle_BT1K), jnp.sin(angle_BT1K)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)


class LlamaLayer(nn.Module):
    """A part of a Llama block, whose weights may have low-rank additions (model.lora)."""

    config: ModelConfig
    linear_init: Callable[..., Initializer] = linear_init

    def weight(self, name: str, axes: tuple[str, str], shape: tuple[int, int], scale: float = 1.0) -> Weight:
        """The weight [in, out] of this name; `axes` and `scale` are those of `linear_init`."""
        return with_addition(self, self.config.lora, name, axes, self.param(name, self.linear_init(axes, scale), shape))


class SelfAttention(LlamaLayer):
    """Grouped-query causal self-attention within each segment, with RoPE; no biases.

    Attributes:
      context_keys: see `ModelSpec`.
    """

    context_keys: str = "gather"

    @nn.compact
    def __call__(
        self, x_BSTD: jax.Array, layout: Layout, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B,S,T,D], already normalised, to the same shape; and the cache with its keys and values appended.

        With a cache, S = 1 and the T tokens continue the cached segment.
        """
        c = self.config
        B, S, T, D = x_BSTD.shape
        H, G, K = c.num_heads, c.num_kv_heads, c.attention_head_dim
        w_q, w_k, w_v, w_o = self.weights(D)

        x_NTD = x_BSTD.reshape(B * S, T, D)  # N = B·S: every segment by itself
        position_NT, document_NT = layout.position_BST.reshape(B * S, T), layout.document_BST.reshape(B * S, T)
        frequencies_K = rope_frequencies(K, c.rope_theta, c.rope_scaling)
        q_NTHK = rotate(dense(x_NTD, w_q).reshape(B * S, T, H, K), position_NT, frequencies_K)
        k_NTGK = rotate(dense(x_NTD, w_k).reshape(B * S, T, G, K), position_NT, frequencies_K)
        v_NTGK = dense(x_NTD, w_v).reshape(B * S, T, G, K)
        if self.is_mutable_collection("intermediates"):
            visible_NTT = jnp.tril(document_NT[:, :, None] == document_NT[:, None])
            self.sow("intermediates", "weights", attention_weights(q_NTHK, k_NTGK, visible_NTT))
        if cache is None:
            if is_shared():
                attended_NTHK = shared_attention(q_NTHK, k_NTGK, v_NTGK, document_NT, self.context_keys)
            else:
                documents = {"q_document_ids_BT": document_NT, "kv_document_ids_BU": document_NT}
                attended_NTHK = attention(q_NTHK, k_NTGK, v_NTGK, causal=True, **documents)
        else:
            index_BT = layout.cache_index_BST[:, 0]
            cache = cache.append(k_NTGK, v_NTGK, index_BT)
            attended_NTHK = attention_to_cache(q_NTHK, cache.keys_BGCK, cache.values_BGCK, index_BT)
        return dense(attended_NTHK.reshape(B, S, T, H * K), w_o), cache

    def weights(self, width: int) -> tuple[Weight, Weight, Weight, Weight]:
        """Projections to queries, keys and values, and from heads back to the width D."""
        c = self.config
        heads, kv_heads = c.num_heads * c.attention_head_dim, c.num_kv_heads * c.attention_head_dim
        return (
            self.weight("query", ("embed", "heads"), (width, heads)),
            self.weight("key", ("embed", "kv_heads"), (width, kv_heads)),
            self.weight("value", ("embed", "kv_heads"), (width, kv_heads)),
            self.weight("output", ("heads", "embed"), (heads, width), 1 / (2 * c.num_layers)),
        )


class SwiGLU(LlamaLayer):
    """Llama's feed-forward: down(silu(gate(x)) ⊙ up(x)); no biases."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D], already normalised, to the same shape."""
        c = self.config
        w_gate = self.weight("gate", ("embed", "mlp"), (c.d_model, c.d_ff))
        w_up = self.weight("up", ("embed", "mlp"), (c.d_model, c.d_ff))
        w_down = self.weight("down", ("mlp", "embed"), (c.d_ff, c.d_model), 1 / (2 * c.num_layers))
        return dense(nn.silu(dense(x, w_gate)) * dense(x, w_up), w_down)


class CausalConv(nn.Module):
    """Depthwise causal convolution over the tokens of a document within a segment.

    Beyond the edges of segments, documents and padding, and between tokens and rmt's memory tokens (whose positions are
    not consecutive), it sees zeros, so that memory stays the only link.
    """

    width: int

    @nn.compact
    def __call__(
        self, x_BSTD: jax.Array, layout: Layout, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B,S,T,D], already normalised, to the same shape; and the cache with the tail of its inputs moved on.

        With a cache, S = 1 and the T tokens continue the cached segment.
        """
        initializer = nn.with_logical_partitioning(nn.initializers.normal(1 / self.width), (None, "norm"))
        kernel_WD = self.param("kernel", initializer, (self.width, x_BSTD.shape[-1])).astype(x_BSTD.dtype)
        y_BSTD = x_BSTD * kernel_WD[0]
        if cache is not None:
            return self._continue(cache, x_BSTD, y_BSTD, kernel_WD, layout)
        for back in range(1, min(self.width, x_BSTD.shape[2])):
            before_BSTD = jnp.pad(x_BSTD[:, :, :-back], ((0, 0), (0, 0), (back, 0), (0, 0)))
            document_BST, position_BST = layout.document_BST, layout.position_BST
            linked_BST = document_BST[:, :, back:] == document_BST[:, :, :-back]
            linked_BST &= position_BST[:, :, back:] - position_BST[:, :, :-back] == back
            linked_BST = jnp.pad(linked_BST, ((0, 0), (0, 0), (back, 0)))
            y_BSTD += jnp.where(linked_BST[..., None], before_BSTD, 0) * kernel_WD[back]
        return y_BSTD, None

    def _continue(
        self, cache: KVCache, x_B1TD: jax.Array, y_B1TD: jax.Array, kernel_WD: jax.Array, layout: Layout
    ) -> tuple[jax.Array, KVCache]:
        """Convolves tokens that continue a segment; a token at position p has p predecessors to look back on."""
        T, tail = x_B1TD.shape[2], self.width - 1
        joined_BTD = jnp.concatenate([cache.tail_BWD, x_B1TD[:, 0]], axis=1)
        for back in range(1, self.width):
            before_BTD = joined_BTD[:, tail - back : tail - back + T]
            linked_BT = layout.position_BST[:, 0] >= back
            y_B1TD += (jnp.where(linked_BT[..., None], before_BTD, 0) * kernel_WD[back])[:, None]
        last_BW = jnp.sum(layout.document_BST[:, 0] > 0, axis=1)[:, None] + jnp.arange(tail)
        return y_B1TD, cache.replace(tail_BWD=jnp.take_along_axis(joined_BTD, last_BW[..., None], axis=1))
