"""Kind `armt`: the Associative Recurrent Memory Transformer (arXiv 2407.04841).

A segment is read as [T tokens | m memory tokens] under a causal mask. The memory tokens are learned, the same for every
segment. Each block has an associative matrix A and a normaliser z. The block's whole input, memory tokens included,
recalls from them before self-attention, and after the block its m memory tokens are stored in them. The paper's
equations of its associative block, by its letters, with phi the DPFP-3 features (arXiv 2102.11174):

    `store`, from a memory token m of the block's output, summed over the m of them
        k = W_K m,  v = W_V m,  beta = sigmoid(W_beta m)    key, value and importance
        v_bar = A phi(k) / (z^T phi(k))                     what A held for k before this segment
        gamma = 1 - (z^T phi(k)) / |phi(k)|^2               how new k is
        A <- A + beta (v - v_bar) (x) phi(k)                the delta rule
        z <- z + gamma phi(k)                               so that what is known counts once
    `recall`, for every position x of the block's input
        q = W_Q x,  y = A phi(q) / (z^T phi(q)),  x <- x + y

As in the authors' code, and not in the paper: phi has length 1, gamma is cut to [0, 1] and has no gradient, a small
number is added to the denominators, and W_V starts at zero, so that a fresh model recalls nothing. Without the cut,
several memory tokens with equal keys would make z negative. Unlike rmt's, memory tokens are not carried to the next
segment, so that a block's memory depends on that block alone, and a window may run layer by layer.

Axes: B lanes, S segments, T tokens, D model width, m memory tokens, X = T + m positions, M key width, F = 6 M features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from lm2_jax.model.layers import Initializer, Layout, linear_init, of_length_1, replicated_dense, vector
from lm2_jax.model.memory.base import BlockMemory, Memory, MemoryKind, Parameters, select_lanes

_ORDERS = (1, 2, 3)  # of DPFP-3
_EPS = 1e-5


@struct.dataclass
class Associations:
    """Contents of a memory; a document starts from zeros.

    Attributes:
      matrix_BFD: A transposed, float32: a row for each feature. With a leading axis L in the memory of a model.
      normaliser_BF: z, float32.
    """

    matrix_BFD: jax.Array
    normaliser_BF: jax.Array


def features(x: jax.Array) -> jax.Array:
    """DPFP-3: [..., M] to [..., 6 M] of length 1, float32 and not negative."""
    x = x.astype(jnp.float32)
    r = jnp.concatenate([nn.relu(x), nn.relu(-x)], axis=-1)
    phi = jnp.concatenate([r * jnp.roll(r, order, axis=-1) for order in _ORDERS], axis=-1)
    return of_length_1(phi)


def recall(stored: Associations, phi_BXF: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """A phi / (z^T phi), float32 [B,X,D], and z^T phi [B,X]; the product with A is taken in `dtype`."""
    known_BX = jnp.einsum("bxf,bf->bx", phi_BXF, stored.normaliser_BF)
    found_BXD = jnp.einsum(
        "bxf,bfd->bxd", phi_BXF.astype(dtype), stored.matrix_BFD.astype(dtype), preferred_element_type=jnp.float32
    )
    return found_BXD / (known_BX[..., None] + _EPS), known_BX


def store(p: Parameters, y_BmD: jax.Array, stored: Associations) -> tuple[Associations, jax.Array]:
    """The associations after a segment whose memory tokens left the block as y; and beta [B,m,1]."""
    phi_BmF = features(replicated_dense(y_BmD, p["key"]))
    value_BmD = replicated_dense(y_BmD, p["value"]).astype(jnp.float32)
    beta_Bm1 = nn.sigmoid(replicated_dense(y_BmD, p["beta"]).astype(jnp.float32) + p["beta_bias"])
    before_BmD, known_Bm = recall(stored, phi_BmF, jnp.float32)
    gamma_Bm = jax.lax.stop_gradient(jnp.clip(1 - known_Bm / (jnp.sum(phi_BmF**2, axis=-1) + 1e-12), 0, 1))
    stored = Associations(
        stored.matrix_BFD + jnp.einsum("bmf,bmd->bfd", phi_BmF, beta_Bm1 * (value_BmD - before_BmD)),
        stored.normaliser_BF + jnp.einsum("bmf,bm->bf", phi_BmF, gamma_Bm),
    )
    return stored, beta_Bm1


class AssociativeMemory(BlockMemory):
    """One block's associations, in one segment: recalled on the way in, stored on the way out.

    In packed segments, tokens of a document that began inside the segment recall nothing. The memory tokens belong to
    the segment's last document, and store into nothing if it began there.
    """

    def setup(self) -> None:
        """The projections."""
        D, M = self.spec.model.d_model, self.spec.memory_width
        shapes: dict[str, tuple[Initializer, tuple[int, ...]]] = {
            "query": (linear_init(("embed", "slot_out")), (D, M)),
            "key": (linear_init(("embed", "slot_out")), (D, M)),
            "value": (nn.with_logical_partitioning(nn.initializers.zeros, ("embed", "heads")), (D, D)),
            "beta": (linear_init(("embed", None)), (D, 1)),
            "beta_bias": (vector(0.0, None), (1,)),
        }
        self.p = {name: self.param(name, init, shape) for name, (init, shape) in shapes.items()}

    def before_attention(self, x_BSTD: jax.Array, bank: Associations, layout: Layout) -> tuple[jax.Array, Associations]:
        """Recalls for every position x [B,1,X,D]; also returns the bank as the segment finds it."""
        bank = _forget(layout.reset_BS[:, 0], bank)
        phi_BXF = features(replicated_dense(x_BSTD[:, 0], self.p["query"]))
        y_BXD, _ = recall(bank, phi_BXF, x_BSTD.dtype)
        if layout.packed:
            y_BXD = jnp.where(layout.document_BST[:, 0, :, None] > 1, 0, y_BXD)
        weights_BXF = phi_BXF * bank.normaliser_BF[:, None]
        self.sow("intermediates", "read", weights_BXF / (jnp.sum(weights_BXF, axis=-1, keepdims=True) + _EPS))
        return x_BSTD + y_BXD[:, None].astype(x_BSTD.dtype), bank

    def after_feed_forward(self, y_BSTD: jax.Array, bank: Associations, layout: Layout) -> Associations:
        """Stores the memory tokens, which are the last positions of y [B,1,X,D]."""
        m = layout.memory_tokens
        if not m:  # a piece of an unfinished segment
            return bank
        document_B = layout.document_BST[:, 0, -1]
        before = _forget(document_B > 1, bank) if layout.packed else bank
        after, beta_Bm1 = store(self.p, y_BSTD[:, 0, -m:], before)
        self.sow("gates", "input", jnp.mean(beta_Bm1))
        return select_lanes(0, document_B > 0, after, bank)


def _forget(lanes_B: jax.Array, bank: Associations) -> Associations:
    return select_lanes(0, lanes_B, jax.tree.map(jnp.zeros_like, bank), bank)


class ARMT(MemoryKind):
    """Memory: the associations of all blocks that have a bank, [L,B,...]."""

    lane_axis = 1
    block_is_recurrent = True
    decodes_in_place = True

    @property
    def num_bank_layers(self) -> int:
        """Number of blocks with associations."""
        return self.spec.num_memory_layers

    @property
    def num_memory_tokens(self) -> tuple[int, int]:
        """Number m of memory tokens after a segment's."""
        return 0, self.spec.memory.num_slots

    def parameters(self) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """The memory tokens, drawn like embeddings."""
        initializer = nn.initializers.normal(self.spec.model.embedding_std)
        initializer = nn.with_logical_partitioning(initializer, (None, "embed"))
        return {"memory_tokens": (initializer, (self.spec.memory.num_slots, self.spec.model.d_model))}

    def initial(self, parameters: Parameters | None) -> Memory:
        """Zeros."""
        L, F, D = self.num_bank_layers, 2 * len(_ORDERS) * self.spec.memory_width, self.spec.model.d_model
        return Associations(jnp.zeros((L, F, D)), jnp.zeros((L, F)))

    def memory_tokens(self, parameters: Parameters, memory: Memory) -> jax.Array:
        """The learned memory tokens, for every lane."""
        tokens_mD = parameters["memory_tokens"]
        return jnp.broadcast_to(tokens_mD, (memory.normaliser_BF.shape[1], *tokens_mD.shape))

    def block_memory(self) -> Callable[[], BlockMemory]:
        """Recall and store of one block."""
        return functools.partial(AssociativeMemory, self.spec)

    def before_blocks(
        self, parameters: Parameters, x_BSTD: jax.Array, layout: Layout, memory: Memory
    ) -> tuple[jax.Array, Layout, Memory]:
        """[T | m] of every segment. Memory tokens sit at position 0, where RoPE does not rotate them."""
        m, (B, S, _, D) = self.spec.memory.num_slots, x_BSTD.shape
        tokens_BSmD = jnp.broadcast_to(parameters["memory_tokens"].astype(x_BSTD.dtype), (B, S, m, D))

        def join(of_tokens_BST: jax.Array, of_memory_BS: jax.Array) -> jax.Array:
            of_memory_BSm = jnp.broadcast_to(of_memory_BS[..., None], (B, S, m)).astype(of_tokens_BST.dtype)
            return jnp.concatenate([of_tokens_BST, of_memory_BSm], axis=2)

        layout = layout.replace(
            document_BST=join(layout.document_BST, jnp.max(layout.document_BST, axis=2)),
            position_BST=join(layout.position_BST, jnp.zeros((B, S))),
            memory_tokens=m,
        )
        return jnp.concatenate([x_BSTD, tokens_BSmD], axis=2), layout, memory

    def after_blocks(self, y_BSTD: jax.Array, layout: Layout, memory: Memory) -> tuple[jax.Array, Memory]:
        """Outputs of the tokens."""
        return y_BSTD[:, :, : -self.spec.memory.num_slots], memory

    def as_slots(self, memory: Memory) -> jax.Array:
        """The rows of every matrix: a slot for each feature."""
        return memory.matrix_BFD

    def attention_to_slots(self, sown: Mapping[str, Any]) -> tuple[jax.Array, None]:
        """Each feature's share of z^T phi(q), for the tokens; what slots take comes from memory tokens alone."""
        m = self.spec.memory.num_slots
        return sown["bank_blocks"]["memory"]["read"][0][:, :, :-m], None
