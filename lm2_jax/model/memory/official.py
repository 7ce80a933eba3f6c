"""Kind `official`: what the LM2 authors' published code computes, exactly, for parity and conversion.

It differs from the paper and from kind `lm2`, and is not a model to train anew:

- It looks ahead. The gates average over all tokens of a segment, and token t is given row t of the memory they wrote.
- Slots, segment length and model width must be equal (N = T = D), and a segment must be whole.
- One bank is passed through all blocks and on to the next segment; no gradient crosses a segment's end.

Axes: B lanes, T tokens, N memory slots = slot width = model width = T, H memory heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.model.layers import Initializer, Layout, dense, vector
from lm2_jax.model.memory.base import BlockMemory, Memory, MemoryKind, Parameters

LAYER_NORM_EPS = 1e-5


def linear_init(axes: tuple[str | None, ...], scale: float = 1.0) -> Initializer:
    """Weight [in, out] of a linear map as torch starts it, U(±1/√in), and its logical axes; `scale` is not used."""
    return nn.with_logical_partitioning(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), axes)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-5) · scale + bias over the last axis, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS) * scale + bias


def heads(p: Parameters, name: str, num_heads: int, x: jax.Array) -> jax.Array:
    """A projection of x [B,T,N] (query, key or value), [B,T,H,N/H]."""
    projected = dense(x, p[name]) + p[f"{name}_bias"].astype(x.dtype)
    return projected.reshape(*x.shape[:2], num_heads, -1)


def attention_weights(p: Parameters, num_heads: int, a_BTN: jax.Array, bank_BNN: jax.Array) -> jax.Array:
    """Attention weights of tokens to slots, float32 [B,H,T,N]; token t attends to slots 0..t."""
    _, T, N = a_BTN.shape
    q_BTHK, k_BNHK = heads(p, "query", num_heads, a_BTN), heads(p, "key", num_heads, bank_BNN.astype(a_BTN.dtype))
    scores_BHTN = jnp.einsum("bthk,bnhk->bhtn", q_BTHK, k_BNHK, preferred_element_type=jnp.float32)
    scores_BHTN = scores_BHTN / math.sqrt(N // num_heads)
    return jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, N), bool)), scores_BHTN, -jnp.inf), axis=-1)


def attend(
    p: Parameters, num_heads: int, a_BTN: jax.Array, bank_BNN: jax.Array, dropout_BHTN: jax.Array | None
) -> jax.Array:
    """Tokens attend to slots, token t to slots 0..t, without an output projection; [B,T,N].

    dropout_BHTN: factors of the attention weights (0, or 1 / the fraction kept); None: no dropout.
    """
    weights_BHTN = attention_weights(p, num_heads, a_BTN, bank_BNN)
    if dropout_BHTN is not None:
        weights_BHTN *= dropout_BHTN
    v_BNHK = heads(p, "value", num_heads, bank_BNN.astype(a_BTN.dtype))
    return jnp.einsum("bhtn,bnhk->bthk", weights_BHTN.astype(a_BTN.dtype), v_BNHK).reshape(a_BTN.shape)


def gates(p: Parameters, a_BTN: jax.Array, bank_BNN: jax.Array, token_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Input and forget gates, float32 [B,N,N], from the mean over the segment's tokens (the leak) and the old bank."""
    seen_BTN = nn.relu(p["token_gate_scale"] * a_BTN.astype(jnp.float32)) * token_BT[..., None]
    mean_BN = jnp.sum(seen_BTN, axis=1) / jnp.maximum(jnp.sum(token_BT, axis=1, keepdims=True), 1)
    tokens_B2N = dense(mean_BN, p["token_gate"]) + p["token_gate_bias"]
    g_BN2N = tokens_B2N[:, None] + dense(jnp.tanh(bank_BNN), p["bank_gate"]) + p["bank_gate_bias"]
    g_in_BNN, g_f_BNN = jnp.split(g_BN2N, 2, axis=-1)
    return nn.sigmoid(g_in_BNN + p["input_bias"]), nn.sigmoid(g_f_BNN + p["forget_bias"])


def update(
    p: Parameters,
    num_heads: int,
    a_BTN: jax.Array,
    bank_BNN: jax.Array,
    token_BT: jax.Array,
    dropout_BHTN: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One block's update of the bank.

    Y_1 = LayerNorm_1(M + A);  Y_2 = LayerNorm_2(Y_1 + MLP(Y_1));  M <- g_in ⊙ tanh(Y_2) + g_f ⊙ M

    Args:
      a_BTN: what self-attention adds to the block's input.
      bank_BNN: the float32 bank as the block before left it.
      token_BT: bool, positions that are not padding (the published code has no padding).
      dropout_BHTN: see `attend`.

    Returns:
      the new bank, g_in and g_f; all float32 [B,N,N].
    """
    y_BNN = layer_norm(bank_BNN + attend(p, num_heads, a_BTN, bank_BNN, dropout_BHTN), p["norm_1"], p["norm_1_bias"])

    def mlp_layer(x: jax.Array) -> jax.Array:  # one weight, applied twice
        return nn.relu(dense(x, p["mlp"]) + p["mlp_bias"].astype(x.dtype))

    z_BNN = mlp_layer(mlp_layer(y_BNN.astype(a_BTN.dtype)))
    y_BNN = layer_norm(y_BNN + z_BNN, p["norm_2"], p["norm_2_bias"])
    g_in_BNN, g_f_BNN = gates(p, a_BTN, bank_BNN, token_BT)
    return g_in_BNN * jnp.tanh(y_BNN) + g_f_BNN * bank_BNN, g_in_BNN, g_f_BNN


class OfficialMemory(BlockMemory):
    """A block's part: updates the bank that all blocks share, and adds row t of it to token t."""

    @nn.compact
    def __call__(
        self, x_BSTD: jax.Array, a_BSTD: jax.Array, bank_BNN: jax.Array, layout: Layout
    ) -> tuple[jax.Array, jax.Array]:
        """Takes what self-attention added [B,1,T,N] and the bank; returns what is added to x [B,1,T,N], and the bank.

        Both results are the new bank.
        """
        memory, N = self.spec.memory, bank_BNN.shape[-1]
        p = {name: self.param(name, init, shape) for name, (init, shape) in _parameters(N).items()}
        token_BT = layout.document_BST[:, 0] > 0
        dropout_BHTN = None
        if memory.dropout and not layout.deterministic:
            shape, keep = (bank_BNN.shape[0], memory.num_heads, N, N), 1 - memory.dropout
            dropout_BHTN = jax.random.bernoulli(self.make_rng("dropout"), keep, shape) / keep
        new_BNN, g_in_BNN, g_f_BNN = update(p, memory.num_heads, a_BSTD[:, 0], bank_BNN, token_BT, dropout_BHTN)
        new_BNN = jnp.where(jnp.any(token_BT, axis=1)[:, None, None], new_BNN, bank_BNN)
        if self.is_mutable_collection("intermediates"):
            weights_BHTN = attention_weights(p, memory.num_heads, a_BSTD[:, 0], bank_BNN)
            self.sow("intermediates", "read", jnp.mean(weights_BHTN, axis=1))
        for name, value in (("input", g_in_BNN), ("forget", g_f_BNN)):
            self.sow("gates", name, jnp.mean(value))
        return new_BNN[:, None].astype(x_BSTD.dtype), new_BNN


def _parameters(N: int) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
    """Name to (initialiser, shape) of one block's memory."""

    def uniform(bound: float) -> Initializer:
        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        return nn.with_logical_partitioning(init, ("norm",))

    shapes = {}
    for name, size in (("query", N), ("key", N), ("value", N), ("mlp", N), ("token_gate", 2 * N)):
        shapes[name] = (linear_init(("slot_in", "slot_out")), (N, size))
        shapes[f"{name}_bias"] = (uniform(1 / math.sqrt(N)), (size,))
    by_outputs = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
    normal = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("norm",))
    return shapes | {
        "bank_gate": (nn.with_logical_partitioning(by_outputs, ("slot_in", "slot_out")), (N, 2 * N)),
        "bank_gate_bias": (uniform(1 / math.sqrt(2 * N)), (2 * N,)),
        "token_gate_scale": (normal, (N,)),
        "norm_1": (vector(1.0, "norm"), (N,)),
        "norm_1_bias": (vector(0.0, "norm"), (N,)),
        "norm_2": (vector(1.0, "norm"), (N,)),
        "norm_2_bias": (vector(0.0, "norm"), (N,)),
        "input_bias": (nn.initializers.constant(0.0), ()),
        "forget_bias": (nn.initializers.constant(1.0), ()),
    }


class Official(MemoryKind):
    """Memory: one bank, float32 [B,N,N], that all blocks update in turn, segment after segment."""

    supports_layer_schedule = False
    shares_one_bank = True
    is_causal = False
    linear_init = staticmethod(linear_init)

    @property
    def num_bank_layers(self) -> int:
        """Number of blocks: all of them."""
        return self.spec.num_memory_layers

    def initial(self, parameters: Parameters | None) -> Memory:
        """The identity, [N,N]."""
        return jnp.eye(self.spec.memory.num_slots, dtype=jnp.float32)

    def block_memory(self) -> Callable[[], BlockMemory]:
        """The update of the bank, and what it adds to the tokens."""
        return functools.partial(OfficialMemory, self.spec)

    def before_blocks(
        self, parameters: Parameters, x_BSTD: jax.Array, layout: Layout, memory: Memory
    ) -> tuple[jax.Array, Layout, Memory]:
        """Takes one whole segment; the bank is cut from the gradient, and starts anew in lanes that are reset."""
        B, S, T, _ = x_BSTD.shape
        N = self.spec.memory.num_slots
        if (S, T) != (1, N):
            raise ValueError(f"official reads one whole segment of {N} tokens at a time, not [S,T] = {[S, T]}")
        memory = self.select_lanes(layout.reset_BS[:, 0], self.init_memory(B, parameters), memory)
        return x_BSTD, layout, jax.lax.stop_gradient(memory)

    def as_slots(self, memory: Memory) -> jax.Array:
        """The one bank."""
        return memory[None]

    def attention_to_slots(self, sown: Mapping[str, Any]) -> tuple[jax.Array, None]:
        """Every block reads the bank; slots do not attend to tokens."""
        return sown["bank_blocks"]["memory"]["read"][0], None
