"""The decoder: Llama blocks around whatever memory the kind supplies.

Axes: B lanes, S segments, T tokens, D model width, V vocabulary, L layers. A window [B,S,T] runs layer by layer through
`window`; a single segment [B,T] through `__call__`. segments.py chooses the order for a window; model/decode.py reads a
segment token by token.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.batch import Batch
from lm2_jax.config.spec import ModelSpec
from lm2_jax.model.block import Block
from lm2_jax.model.context import balanced_order, in_text_order
from lm2_jax.model.edge import Edge, initial_edge, join_edges, split_edges
from lm2_jax.model.layers import Layout, RMSNorm, dense
from lm2_jax.model.lora import LowRank, Weight, with_addition
from lm2_jax.model.memory.base import Memory, MemoryKind, Parameters, select_lanes
from lm2_jax.parallel.fsdp import context_shards, with_logical_constraint
from lm2_jax.parallel.mesh import unbox

# What a block keeps for the backward pass, its input, waits in the host's memory.
_INPUTS_ON_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["block_input"],
    offload_src="device",
    offload_dst="pinned_host",
)


STACKS = ("first_blocks", "bank_blocks", "blocks")  # below the banks, with a bank each, above them


class Decoder(nn.Module):
    """A causal language model over segments, whose memory is an argument and a result."""

    spec: ModelSpec
    kind: MemoryKind

    def setup(self) -> None:
        """Embedding, the stacks of blocks, final norm, head."""
        c = self.spec.model
        self.embedding = self._table("embedding")
        self.memory_parameters = {n: self.param(n, init, s) for n, (init, s) in self.kind.parameters().items()}
        self.first_blocks, self.bank_blocks, self.blocks = (self._stack(name) for name in STACKS)
        norm = RMSNorm if self.spec.remat == "none" else nn.remat(RMSNorm)
        self.final_norm = norm(c.norm_eps)
        if not c.tie_embeddings:
            self.head = self._table("head")

    @property
    def stacks(self) -> dict[str, int]:
        """Name of a stack of blocks that is there -> number of its layers."""
        banks = self.kind.num_bank_layers
        below = self.spec.memory.first_layer if banks else 0
        lengths = (below, banks, self.spec.model.num_layers - below - banks)
        return {name: length for name, length in zip(STACKS, lengths, strict=True) if length}

    def _table(self, name: str) -> Weight:
        """An embedding table [V,D]."""
        c, axes = self.spec.model, ("vocab", "embed")
        init = nn.with_logical_partitioning(nn.initializers.normal(c.embedding_std), axes)
        return with_addition(self, c.lora, name, axes, self.param(name, init, (c.vocab_size, c.d_model)))

    def _stack(self, name: str) -> nn.Module | None:
        """The stack of blocks of this name; None where it has no layers."""
        if name not in self.stacks:
            return None
        remat = self.spec.remat
        policy = _INPUTS_ON_HOST if remat == "offload" else None
        block = Block if remat == "none" else nn.remat(Block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "gates": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, 0, 0),
            out_axes=0,
            length=self.stacks[name],
            unroll=self.spec.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(self.spec, self.kind, with_bank=name == "bank_blocks")

    # --- Text in, hidden states and memory out ------------------------------------------------------------------------

    def window(self, batch: Batch, memory: Memory, deterministic: bool = True) -> tuple[jax.Array, Memory]:
        """Hidden states [B,S,T,D] (after the final norm) of all S segments, layer by layer, and the memory after them.

        Memory and `deterministic` are those of `__call__`.
        """
        tokens_BST, layout = batch.tokens_BST, Layout.of(batch, deterministic)
        shards = context_shards(len(tokens_BST))
        if shards > 1:
            order_T = balanced_order(tokens_BST.shape[2], shards)
            tokens_BST, layout = tokens_BST[..., order_T], layout.reordered(order_T)
        x_BSTD = self.embed(tokens_BST)
        if shards > 1:  # lanes are moved before tokens: XLA would replicate what it moves along two axes at once
            x_BSTD = with_logical_constraint(x_BSTD, "batch", None, None, "embed_of_tokens")
        x_BSTD = with_logical_constraint(x_BSTD, "batch", None, "tokens", "activation")
        memory, edges = split_edges(memory)
        x_BSTD, layout, memory = self.kind.before_blocks(self.memory_parameters, x_BSTD, layout, memory)
        x_BSTD, memory, edges = self.run_blocks(x_BSTD, memory, layout, edges)
        hidden_BSTD, memory = self.kind.after_blocks(self.final_norm(x_BSTD), layout, memory)
        if shards > 1:
            hidden_BSTD = in_text_order(hidden_BSTD)
        return hidden_BSTD, join_edges(memory, edges)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [..., D] of token ids [...], in the dtype of activations."""
        dtype = self.spec.dtype
        if not isinstance(self.embedding, LowRank):
            return self.embedding.astype(dtype)[tokens]
        table = self.embedding
        return table.weight.astype(dtype)[tokens] + table.scale * dense(table.a.astype(dtype)[tokens], table.b)

    def run_blocks(
        self, x_BSTD: jax.Array, memory: Memory, layout: Layout, edges: dict[str, Edge]
    ) -> tuple[jax.Array, Memory, dict[str, Edge | None]]:
        """All blocks on x [B,S,T,D]. Memory (the kind's own) and edges by stack (with a window) go in and come out."""
        edges, shares = dict(edges), self.kind.shares_one_bank
        for name in self.stacks:
            bank = memory if name == "bank_blocks" else None
            shared, own = (bank, None) if shares else (None, bank)
            (x_BSTD, shared), (own, _, edges[name]) = getattr(self, name)(
                (x_BSTD, shared), own, layout, None, edges.get(name)
            )
            if name == "bank_blocks":
                memory = shared if shares else own
        return x_BSTD, memory, edges

    def output_table(self) -> jax.Array:
        """The output embedding [V,D]: the head, or the embedding that is one; with its low-rank addition."""
        table = self.embedding if self.spec.model.tie_embeddings else self.head
        return table.merged() if isinstance(table, LowRank) else table

    def project(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to logits [..., V], float32."""
        table_VD = self.output_table()
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
          document_BT: int32 document ids: 0 padding, 1, 2, ... the segment's documents in order; None: one document
            without padding.
          reset_B: bool, the segment's first document starts here, so that it finds the initial memory.
          deterministic: no dropout; otherwise `apply` needs rngs={"dropout": key} (kind official alone has any).

        Returns:
          float32 logits [B,T,V] and the memory after the segment.
        """
        batch = window_batch(tokens_BT[:, None], *(x if x is None else x[:, None] for x in (document_BT, reset_B)))
        hidden_B1TD, memory = self.window(batch, memory, deterministic)
        return self.project(hidden_B1TD[:, 0]), memory

    # --- Parameters and memory to start from --------------------------------------------------------------------------

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{"params": ...} of plain arrays; takes (key, tokens_BT, memory). `init_with_axes` keeps the logical axes."""
        return unbox(self.init_with_axes(*args, **kwargs))

    @nn.nowrap
    def init_with_axes(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Does what `init` does; every array is boxed with the logical axes that parallel/mesh.py maps to the mesh."""
        return {"params": super().init(*args, **kwargs)["params"]}

    @nn.nowrap
    def init_params(self, key: jax.Array, with_axes: bool = False) -> Any:
        """Fresh float32 parameters, the tree under "params"; boxed with their logical axes if `with_axes`."""
        tokens_BT = jnp.zeros((1, self.spec.segment_length), jnp.int32)
        init = self.init_with_axes if with_axes else self.init
        return init(key, tokens_BT, self.init_memory(1))["params"]

    @nn.nowrap
    def abstract_params(self, with_axes: bool = False) -> Any:
        """Shapes and dtypes of `init_params`; nothing is computed."""
        return _abstract_params(self, with_axes)

    @nn.nowrap
    def init_memory(self, batch_size: int, params: Parameters | None = None) -> Memory:
        """The memory of `batch_size` lanes at a document's start.

        Where the start is learned (rmt) it is taken from `params`; without them it is zeros of the right shape.
        """
        memory, c = self.kind.init_memory(batch_size, params), self.spec.model
        if c.window is None:
            return memory
        return join_edges(memory, {name: initial_edge(c, layers, batch_size) for name, layers in self.stacks.items()})

    @property
    def lane_axis(self) -> int:
        """The axis of the lanes B in every leaf of the memory."""
        return self.kind.lane_axis if self.spec.model.window is None else 1

    @nn.nowrap
    def select_lanes(self, take_B: jax.Array, taken: Memory, otherwise: Memory) -> Memory:
        """Selects lane by lane: `taken` where take_B, else `otherwise`; both are memories of B lanes."""
        return select_lanes(self.lane_axis, take_B, taken, otherwise)

    @nn.nowrap
    def as_slots(self, memory: Memory) -> jax.Array | None:
        """The memory as slots for inspection, float32 [L,B,N,M], without edges; None for kinds without memory."""
        return self.kind.as_slots(split_edges(memory)[0])


@functools.cache
def _abstract_params(model: Decoder, with_axes: bool) -> Any:
    return jax.eval_shape(lambda: model.init_params(jax.random.key(0), with_axes))


def window_batch(
    tokens_BST: jax.Array, document_BST: jax.Array | None = None, reset_BS: jax.Array | None = None
) -> Batch:
    """The batch of a window to read. Without document ids it is one document a lane without padding; no resets."""
    return Batch(
        tokens_BST=tokens_BST,
        document_BST=jnp.ones(tokens_BST.shape, jnp.int32) if document_BST is None else document_BST,
        reset_BS=jnp.zeros(tokens_BST.shape[:2], bool) if reset_BS is None else reset_BS,
        packed=document_BST is not None,
    )
