"""Kind `delta`: Gated DeltaNet (arXiv 2412.06464) beside self-attention, as a memory across segments.

Every head of every block has a matrix S, which each token rewrites and then reads, by the gated delta rule:

    S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T        o_t = S_t q_t

with x' the normalised input of the block's self-attention, and as in the paper's block

    q = silu(x' W_q) and k = silu(x' W_k), each of length 1,    v = silu(x' W_v),    beta = sigmoid(x' W_beta)
    alpha = exp(-exp(a) softplus(x' W_alpha + b)),    x <- x + (RMSNorm(o) ⊙ silu(x' W_g)) W_o

The paper's short convolutions before q, k and v are left out: model.conv_width gives a convolution to every kind alike.
S is carried over segments, and a document's first token finds it empty, wherever that token stands. So nothing here
knows of segments: a window is one text, in which the recurrence runs in chunks of C tokens.

Within a chunk that finds S_0, with G_t the sum of the chunk's log alpha up to t, what token t adds is u_t k_t^T, where

    u_t = beta_t (v_t - exp(G_t) S_0 k_t - sum over j < t of exp(G_t - G_j) (k_j . k_t) u_j)

This is a triangular system in the u (the WY form), solved for all chunks at once; only S goes from chunk to chunk.

Axes: B lanes, S segments, T tokens, X tokens of a window, Z chunks, C tokens of a chunk, D model width, H heads,
K key width, V value width (not the vocabulary).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.config.spec import ModelSpec
from lm2_jax.model.layers import Initializer, Layout, linear_init, of_length_1, replicated_dense, rms_norm, vector
from lm2_jax.model.memory.base import BlockMemory, Memory, MemoryKind, Parameters

_CHUNK = 64
_LASTS = (10, 1000)  # tokens after which a head's S has decayed by e, of the first and the last head at the start


def gated_delta_rule(
    q_BXHK: jax.Array,
    k_BXHK: jax.Array,
    v_BXHV: jax.Array,
    log_alpha_BXH: jax.Array,
    beta_BXH: jax.Array,
    starts_BX: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """o [B,X,H,V] of all tokens, and S transposed [B,H,K,V] after the last; all arrays are float32.

    starts_BX: bool, tokens that find S empty. A token whose beta and log alpha are 0 changes nothing.
    """
    X = q_BXHK.shape[1]
    C = min(_CHUNK, X)

    def chunks(x_BX: jax.Array) -> jax.Array:  # [B,X,H,..] to [Z,B,H,C,..]
        x_BX = jnp.pad(x_BX, ((0, 0), (0, -X % C), *[(0, 0)] * (x_BX.ndim - 2)))
        x_BZC = x_BX.reshape(x_BX.shape[0], -1, C, *x_BX.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x_BZC, 3, 2), 1, 0)

    q, k, v, log_alpha, beta = map(chunks, (q_BXHK, k_BXHK, v_BXHV, log_alpha_BXH, beta_BXH))
    decay_ZBHC = jnp.cumsum(log_alpha, axis=-1)  # G
    started_ZB1C = jnp.cumsum(chunks(starts_BX[..., None].astype(jnp.int32)), axis=-1)

    # How much of what token j wrote is left for token t >= j, and for the end; of S_0, for token t and for the end
    left = (started_ZB1C[..., :, None] == started_ZB1C[..., None, :]) & jnp.tri(C, dtype=bool)
    left_ZBHCC = jnp.exp(jnp.where(left, decay_ZBHC[..., :, None] - decay_ZBHC[..., None, :], -jnp.inf))
    left_ZBHC1 = jnp.where(started_ZB1C == 0, jnp.exp(decay_ZBHC), 0)[..., None]

    products_ZBHCC = jnp.einsum("zbhtk,zbhjk->zbhtj", k, k) * left_ZBHCC
    system_ZBHCC = jnp.tril(products_ZBHCC * beta[..., None], -1)
    from_values, from_state = v * beta[..., None], k * left_ZBHC1 * beta[..., None]
    solved = jax.scipy.linalg.solve_triangular(
        system_ZBHCC, jnp.concatenate([from_values, from_state], axis=-1), lower=True, unit_diagonal=True
    )
    from_values, from_state = jnp.split(solved, [v.shape[-1]], axis=-1)
    read_ZBHCC = jnp.einsum("zbhtk,zbhjk->zbhtj", q, k) * left_ZBHCC
    kept = k * left_ZBHCC[..., -1, :, None]

    def chunk(state_BHKV: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        from_values, from_state, read, q, kept, left_end = inputs
        u_BHCV = from_values - from_state @ state_BHKV
        out_BHCV = q @ state_BHKV + read @ u_BHCV
        return left_end * state_BHKV + jnp.swapaxes(kept, -1, -2) @ u_BHCV, out_BHCV

    inputs = (from_values, from_state, read_ZBHCC, q * left_ZBHC1, kept, left_ZBHC1[..., -1:, :])
    state_BHKV, out_ZBHCV = jax.lax.scan(chunk, state_BHKV, inputs)
    out_BZCHV = jnp.moveaxis(out_ZBHCV, (0, 3), (1, 2))
    return out_BZCHV.reshape(len(q_BXHK), -1, *out_BZCHV.shape[3:])[:, :X], state_BHKV


class DeltaMemory(BlockMemory):
    """One block's heads, over a window or over a piece of an unfinished segment."""

    @nn.compact
    def __call__(
        self, x_BSTD: jax.Array, a_BSTD: jax.Array, bank: jax.Array, layout: Layout
    ) -> tuple[jax.Array, jax.Array]:
        """Takes x' [B,S,T,D] and S [B,H,K,V]; returns what the heads add, and S after the last token."""
        (B, S, T, D), H = x_BSTD.shape, self.spec.memory.num_heads
        p = {name: self.param(name, init, shape) for name, (init, shape) in _parameters(self.spec).items()}
        x_BXD = x_BSTD.reshape(B, S * T, D)

        def project(name: str) -> jax.Array:
            return replicated_dense(x_BXD, p[name]).astype(jnp.float32)

        def heads(name: str) -> jax.Array:
            return nn.silu(project(name)).reshape(B, S * T, H, -1)

        token_BX1 = (layout.document_BST > 0).reshape(B, S * T, 1)
        log_alpha_BXH = -jnp.exp(p["decay_rate_bias"]) * nn.softplus(project("decay") + p["decay_bias"])
        beta_BXH = nn.sigmoid(project("beta"))
        for name, value_BXH in (("input", beta_BXH), ("forget", jnp.exp(log_alpha_BXH))):
            self.sow("gates", name, jnp.mean(value_BXH))
        log_alpha_BXH, beta_BXH = (jnp.where(token_BX1, x, 0) for x in (log_alpha_BXH, beta_BXH))
        q_BXHK, k_BXHK, v_BXHV = of_length_1(heads("query"), 1e-6), of_length_1(heads("key"), 1e-6), heads("value")
        starts_BX = _starts(layout).reshape(B, S * T)
        out_BXHV, bank = gated_delta_rule(q_BXHK, k_BXHK, v_BXHV, log_alpha_BXH, beta_BXH, starts_BX, bank)
        out_BXD = rms_norm(out_BXHV, p["output_norm"], self.spec.model.norm_eps).reshape(B, S * T, D)
        added_BXD = replicated_dense((out_BXD * nn.silu(project("gate"))).astype(x_BSTD.dtype), p["output"])

        if self.is_mutable_collection("intermediates"):
            for name, size_BXHK in (("read", q_BXHK), ("write", k_BXHK * beta_BXH[..., None])):
                self.sow("intermediates", name, jnp.abs(size_BXHK).reshape(B, S * T, -1))
        return added_BXD.reshape(x_BSTD.shape), bank


def _starts(layout: Layout) -> jax.Array:
    """bool [B,S,T], the tokens with which a document starts."""
    first_BS1 = layout.reset_BS[..., None]
    document_BST = layout.document_BST
    if not layout.packed:
        return jnp.pad(first_BS1, ((0, 0), (0, 0), (0, document_BST.shape[2] - 1)))
    inside = (document_BST[..., 1:] != document_BST[..., :-1]) & (document_BST[..., 1:] > 0)
    return jnp.concatenate([first_BS1, inside], axis=2)


def _parameters(spec: ModelSpec) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
    """Name to (initialiser, shape) of one block's memory."""
    D, H, keys = spec.model.d_model, spec.memory.num_heads, spec.memory_width

    def decays(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:  # softplus of them is 1 / tokens that S lasts
        return jnp.log(jnp.expm1(1 / jnp.geomspace(*_LASTS, *shape)))

    return {
        "query": (linear_init(("embed", "heads")), (D, keys)),
        "key": (linear_init(("embed", "heads")), (D, keys)),
        "value": (linear_init(("embed", "heads")), (D, D)),
        "beta": (linear_init(("embed", None)), (D, H)),
        "decay": (linear_init(("embed", None)), (D, H)),
        "decay_bias": (nn.with_logical_partitioning(decays, (None,)), (H,)),
        "decay_rate_bias": (vector(0.0, None), (H,)),
        "gate": (linear_init(("embed", "heads")), (D, D)),
        "output_norm": (vector(1.0, "norm"), (D // H,)),
        "output": (linear_init(("heads", "embed"), 1 / (2 * spec.model.num_layers)), (D, D)),
    }


class Delta(MemoryKind):
    """Memory: S of every head of the blocks that have any, transposed, float32 [L,B,H,K,V]; zeros at the start."""

    lane_axis = 1
    decodes_in_place = True

    @property
    def num_bank_layers(self) -> int:
        """Number of blocks with such heads."""
        return self.spec.num_memory_layers

    def initial(self, parameters: Parameters | None) -> Memory:
        """Zeros [L,H,K,V]."""
        H = self.spec.memory.num_heads
        return jnp.zeros((self.num_bank_layers, H, self.spec.memory_width // H, self.spec.model.d_model // H))

    def block_memory(self) -> Callable[[], BlockMemory]:
        """The heads of one block."""
        return functools.partial(DeltaMemory, self.spec)

    def as_slots(self, memory: Memory) -> jax.Array:
        """The rows of every head's matrix: a slot for each feature of a key."""
        return memory.reshape(*memory.shape[:2], math.prod(memory.shape[2:4]), memory.shape[4])

    def attention_to_slots(self, sown: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Shares of |q| for each token, and of beta |k| for each slot."""
        size = {name: x[0] for name, x in sown["bank_blocks"]["memory"].items()}
        read_LBTN, write_LBNT = size["read"], jnp.swapaxes(size["write"], -1, -2)
        return tuple(x / (jnp.sum(x, axis=-1, keepdims=True) + 1e-9) for x in (read_LBTN, write_LBNT))
