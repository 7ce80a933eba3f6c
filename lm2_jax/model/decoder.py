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
from lm2_jax.model.edge import Edge, initial_edge, join_edges, split_edges
from lm2_jax.model.layers import KVCache, Layout, RMSNorm
from lm2_jax.model.memory.base import Memory, MemoryKind, Parameters, select_lanes
from lm2_jax.parallel.fsdp import with_logical_constraint
from lm2_jax.parallel.mesh import unbox

# What a block keeps for the backward pass, its input, waits in the host's memory.
_INPUTS_ON_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["block_input"],
    offload_src="device",
    offload_dst="pinned_host",
)


class Decoder(nn.Module):
    """A causal language model over segments, whose memory is an argument and a result."""

    spec: ModelSpec
    kind: MemoryKind

    def setup(self) -> None:
        """Embedding, blocks with a bank, blocks without, final norm, head."""
        c = self.spec.model
        table = nn.with_logical_partitioning(nn.initializers.normal(c.embedding_std), ("vocab", "embed"))
        self.embedding = self.param("embedding", table, (c.vocab_size, c.d_model))
        self.memory_parameters = {n: self.param(n, init, s) for n, (init, s) in self.kind.parameters().items()}
        stacks = self.stacks
        self.bank_blocks = self._stack(stacks["bank_blocks"], with_bank=True) if "bank_blocks" in stacks else None
        self.blocks = self._stack(stacks["blocks"], with_bank=False) if "blocks" in stacks else None
        norm = RMSNorm if self.spec.remat == "none" else nn.remat(RMSNorm)
        self.final_norm = norm(c.norm_eps)
        if not c.tie_embeddings:
            self.head = self.param("head", table, (c.vocab_size, c.d_model))

    @property
    def stacks(self) -> dict[str, int]:
        """Name of a stack of blocks -> number of its layers: those with a bank, then those without."""
        banks = self.kind.num_bank_layers
        lengths = {"bank_blocks": banks, "blocks": self.spec.model.num_layers - banks}
        return {name: length for name, length in lengths.items() if length}

    def _stack(self, length: int, with_bank: bool) -> nn.Module:
        remat = self.spec.remat
        policy = _INPUTS_ON_HOST if remat == "offload" else None
        block = Block if remat == "none" else nn.remat(Block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "gates": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, 0, 0),
            out_axes=0,
            length=length,
            unroll=self.spec.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(self.spec, self.kind, with_bank)

    # --- Text in, hidden states and memory out ------------------------------------------------------------------------

    def window(self, batch: Batch, memory: Memory, deterministic: bool = True) -> tuple[jax.Array, Memory]:
        """Hidden states [B,S,T,D] (after the final norm) of all S segments, layer by layer, and the memory after them.

        Memory and `deterministic` are those of `__call__`.
        """
        layout, x_BSTD = Layout.of(batch, deterministic), self.embed(batch.tokens_BST)
        x_BSTD = with_logical_constraint(x_BSTD, "batch", None, None, "activation")
        memory, edges = split_edges(memory)
        x_BSTD, layout, memory = self.kind.before_blocks(self.memory_parameters, x_BSTD, layout, memory)
        x_BSTD, memory, _, edges = self.run_blocks(x_BSTD, memory, layout, {}, edges)
        hidden_BSTD, memory = self.kind.after_blocks(self.final_norm(x_BSTD), layout, memory)
        return hidden_BSTD, join_edges(memory, edges)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [..., D] of token ids [...], in the dtype of activations."""
        return self.embedding.astype(self.spec.dtype)[tokens]

    def run_blocks(
        self, x_BSTD: jax.Array, memory: Memory, layout: Layout, caches: dict[str, KVCache], edges: dict[str, Edge]
    ) -> tuple[jax.Array, Memory, dict[str, KVCache], dict[str, Edge | None]]:
        """All blocks on x [B,S,T,D].

        Memory (the kind's own), the caches by stack (in decoding) and the edges by stack (with a window) go in and come
        out.
        """
        caches, edges = dict(caches), dict(edges)
        if self.bank_blocks is not None:
            shared, own = (memory, None) if self.kind.shares_one_bank else (None, memory)
            (x_BSTD, shared), (own, caches["bank_blocks"], edges["bank_blocks"]) = self.bank_blocks(
                (x_BSTD, shared), own, layout, caches.get("bank_blocks"), edges.get("bank_blocks")
            )
            memory = shared if self.kind.shares_one_bank else own
        if self.blocks is not None:
            (x_BSTD, _), (_, caches["blocks"], edges["blocks"]) = self.blocks(
                (x_BSTD, None), None, layout, caches.get("blocks"), edges.get("blocks")
            )
        return x_BSTD, memory, caches, edges

    def project(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] to logits [..., V], float32."""
        table_VD = self.embedding if self.spec.model.tie_embeddings else self.head
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
