"""The decoder: Llama blocks around whatever memory the kind supplies.

Axes: B lanes, S segments, T tokens, D model width, V vocabulary, L layers. A window [B,S,T] runs through `window` layer
by layer; a single segment [B,T] through `__call__`. segments.py chooses between them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.config import Config
from lm2_jax.model.kind import Memory, MemoryKind, Parameters
from lm2_jax.model.layers import CausalConv, Layout, RMSNorm, SelfAttention, SwiGLU, unbox


class Block(nn.Module):
    """One layer over the S segments of a window; with a bank if `with_bank`."""

    config: Config
    kind: MemoryKind
    with_bank: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Memory], own_bank: Memory, layout: Layout
    ) -> tuple[tuple[jax.Array, Memory], Memory]:
        """(x [B,S,T,D], a bank that passes through or None) and the block's own bank: before the window to after."""
        x_BSTD, passing_bank = carry
        bank = own_bank if passing_bank is None else passing_bank
        if self.config.train.remat == "full" and x_BSTD.shape[1] > 1:
            x_BSTD, bank = self._segment_by_segment(x_BSTD, bank, layout)
        else:
            x_BSTD, bank = self._window(x_BSTD, bank, layout)
        return ((x_BSTD, None), bank) if passing_bank is None else ((x_BSTD, bank), None)

    def _window(self, x_BSTD: jax.Array, bank: Memory, layout: Layout) -> tuple[jax.Array, Memory]:
        c = self.config.model
        if c.conv_width:
            normed_BSTD = RMSNorm(c.norm_eps, name="conv_norm")(x_BSTD)
            x_BSTD += CausalConv(c.conv_width, name="conv")(normed_BSTD, layout)
        normed_BSTD = RMSNorm(c.norm_eps, name="attention_norm")(x_BSTD)
        attended_BSTD = SelfAttention(c, self.kind.linear_init, name="attention")(normed_BSTD, layout)
        x_BSTD += attended_BSTD
        if self.with_bank:
            added_BSTD, bank = self.kind.block_memory()(name="memory")(normed_BSTD, attended_BSTD, bank, layout)
            x_BSTD += added_BSTD
        normed_BSTD = RMSNorm(c.norm_eps, name="mlp_norm")(x_BSTD)
        x_BSTD += SwiGLU(c, self.kind.linear_init, name="mlp")(normed_BSTD)
        return nn.with_logical_constraint(x_BSTD, ("batch", None, None, "activation")), bank

    def _segment_by_segment(self, x_BSTD: jax.Array, bank: Memory, layout: Layout) -> tuple[jax.Array, Memory]:
        """The same, holding the activations of one segment at a time: only x and the bank of each are kept."""

        def segment(block: Block, bank: Memory, inputs: tuple[jax.Array, Layout]) -> tuple[Memory, jax.Array]:
            x_BTD, layout = inputs
            x_B1TD, bank = block._window(x_BTD[:, None], bank, jax.tree.map(lambda a: a[:, None], layout))
            return bank, x_B1TD[:, 0]

        over_segments = nn.scan(
            nn.remat(segment, prevent_cse=False),
            variable_broadcast="params",
            variable_axes={"gates": 0},
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        bank, x_BSTD = over_segments(self, bank, (x_BSTD, layout))
        return x_BSTD, bank


class Decoder(nn.Module):
    """A causal language model over segments, whose memory is an argument and a result."""

    config: Config
    kind: MemoryKind

    def setup(self) -> None:
        """Embedding, blocks with a bank, blocks without, final norm, head."""
        c = self.config.model
        table = nn.with_logical_partitioning(nn.initializers.normal(c.embedding_std), ("vocab", "embed"))
        self.embedding = self.param("embedding", table, (c.vocab_size, c.d_model))
        self.memory_parameters = {n: self.param(n, init, s) for n, (init, s) in self.kind.parameters().items()}
        banks = self.kind.num_bank_layers
        self.bank_blocks = self._stack(banks, with_bank=True) if banks else None
        self.blocks = self._stack(c.num_layers - banks, with_bank=False) if banks < c.num_layers else None
        norm = RMSNorm if self.config.train.remat == "none" else nn.remat(RMSNorm)
        self.final_norm = norm(c.norm_eps)
        if not c.tie_embeddings:
            self.head = self.param("head", table, (c.vocab_size, c.d_model))

    def _stack(self, length: int, with_bank: bool) -> nn.Module:
        block = Block if self.config.train.remat == "none" else nn.remat(Block, prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "gates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(self.config, self.kind, with_bank)

    def window(
        self,
        tokens_BST: jax.Array,
        memory: Memory,
        document_BST: jax.Array | None = None,
        reset_BS: jax.Array | None = None,
        packed: bool = True,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Memory]:
        """Hidden states [B,S,T,D] (after the final norm) of all S segments, layer by layer, and the memory after them.

        See `segments.run_segments` for the arguments.
        """
        layout = _layout(tokens_BST, document_BST, reset_BS, packed, deterministic)
        x_BSTD = self.embedding.astype(self.config.train.dtype)[tokens_BST]
        x_BSTD = nn.with_logical_constraint(x_BSTD, ("batch", None, None, "activation"))
        x_BSTD, layout, memory = self.kind.enter(self.memory_parameters, x_BSTD, layout, memory)
        if self.bank_blocks is not None:
            passing, own = (memory, None) if self.kind.bank_passes_through else (None, memory)
            (x_BSTD, passing), own = self.bank_blocks((x_BSTD, passing), own, layout)
            memory = passing if self.kind.bank_passes_through else own
        if self.blocks is not None:
            (x_BSTD, _), _ = self.blocks((x_BSTD, None), None, layout)
        return self.kind.leave(self.final_norm(x_BSTD), layout, memory)

    def project(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to logits [..., V], float32."""
        table_VD = self.embedding if self.config.model.tie_embeddings else self.head
        return jnp.einsum("...d,vd->...v", hidden, table_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens_BT: jax.Array,
        memory: Memory,
        *,
        document_BT: jax.Array | None = None,
        reset_B: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Memory]:
        """One segment.

        Args:
          tokens_BT: int32 token ids.
          memory: what `init_memory` or the previous segment returned.
          document_BT: int32, 0 padding, 1, 2, ... the segment's documents in order; None: one document, no padding.
          reset_B: bool, the segment's first document starts here, so that it finds the initial memory.
          deterministic: no dropout; otherwise `apply` needs rngs={"dropout": key} (kind official alone has any).

        Returns:
          float32 logits [B,T,V] and the memory after the segment.
        """
        document_B1T = None if document_BT is None else document_BT[:, None]
        reset_B1 = None if reset_B is None else reset_B[:, None]
        hidden_B1TD, memory = self.window(
            tokens_BT[:, None], memory, document_B1T, reset_B1, deterministic=deterministic
        )
        return self.project(hidden_B1TD[:, 0]), memory

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{"params": ...} of plain arrays; takes (key, tokens_BT, memory). `init_with_axes` keeps the logical axes."""
        return unbox(self.init_with_axes(*args, **kwargs))

    @nn.nowrap
    def init_with_axes(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `init`, every array boxed with the logical axis names that sharding.py maps to the mesh."""
        return {"params": super().init(*args, **kwargs)["params"]}

    @nn.nowrap
    def init_memory(self, batch_size: int, params: Parameters | None = None) -> Memory:
        """The memory of `batch_size` lanes at a document's start.

        Where the start is learned (rmt) it is taken from `params`; without them it is zeros of the right shape.
        """
        return self.kind.init_memory(batch_size, params)


def _layout(
    tokens_BST: jax.Array,
    document_BST: jax.Array | None,
    reset_BS: jax.Array | None,
    packed: bool,
    deterministic: bool,
) -> Layout:
    if document_BST is None:
        document_BST, packed = jnp.ones(tokens_BST.shape, jnp.int32), False
    if reset_BS is None:
        reset_BS = jnp.zeros(tokens_BST.shape[:2], bool)
    position_BST = jnp.broadcast_to(jnp.arange(tokens_BST.shape[2]), tokens_BST.shape)
    return Layout(document_BST, position_BST, reset_BS, packed, deterministic)
