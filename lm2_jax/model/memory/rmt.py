"""Kind `rmt`: the Recurrent Memory Transformer (arXiv 2207.06881), in the decoder form of its public code.

A segment is read as [m memory tokens | T tokens | m memory tokens] under a plain causal mask. The last layer's output
at the back memory tokens becomes the memory, which is placed at both ends of the next segment.

Axes: B lanes, S segments, T tokens, D model width, m memory tokens, U = m + T + m positions, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.model.layers import Initializer, Layout
from lm2_jax.model.memory.base import Memory, MemoryKind, Parameters


class RMT(MemoryKind):
    """Memory: hidden states of the memory tokens, float32 [B,m,D]; a document starts from learned ones."""

    supports_layer_schedule = False

    @property
    def num_memory_tokens(self) -> tuple[int, int]:
        """The same number on either side."""
        return self.spec.memory.num_slots, self.spec.memory.num_slots

    @property
    def _shape(self) -> tuple[int, int]:
        return self.spec.memory.num_slots, self.spec.model.d_model

    def parameters(self) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """The memory tokens at a document's start, drawn like embeddings."""
        initializer = nn.initializers.normal(self.spec.model.embedding_std)
        initializer = nn.with_logical_partitioning(initializer, (None, "embed"))
        return {"memory_tokens": (initializer, self._shape)}

    def initial(self, parameters: Parameters | None) -> Memory:
        """The learned memory tokens, [m,D]."""
        return jnp.zeros(self._shape) if parameters is None else parameters["memory_tokens"]

    def memory_tokens(self, parameters: Parameters, memory: Memory) -> jax.Array:
        """The memory itself."""
        return memory

    def before_blocks(
        self, parameters: Parameters, x_BSTD: jax.Array, layout: Layout, memory: Memory
    ) -> tuple[jax.Array, Layout, Memory]:
        """[m | T | m] of one segment. Memory tokens sit at position 0, where RoPE does not rotate them."""
        B, S, _, _ = x_BSTD.shape
        if S != 1:
            raise ValueError("rmt runs segment by segment: one segment at a time")
        memory = self.select_lanes(layout.reset_BS[:, 0], self.init_memory(B, parameters), memory)
        memory_BSmD = memory[:, None].astype(x_BSTD.dtype)
        m = memory.shape[1]

        def resolve_inside(middle_BST: jax.Array, value: int) -> jax.Array:
            return jnp.pad(middle_BST, ((0, 0), (0, 0), (m, m)), constant_values=value)

        layout = layout.replace(
            document_BST=resolve_inside((layout.document_BST > 0).astype(jnp.int32), 1),
            position_BST=resolve_inside(layout.position_BST, 0),
        )
        return jnp.concatenate([memory_BSmD, x_BSTD, memory_BSmD], axis=2), layout, memory

    def after_blocks(self, y_BSTD: jax.Array, layout: Layout, memory: Memory) -> tuple[jax.Array, Memory]:
        """Outputs of the T middle tokens, and the memory: the back memory tokens, or the old memory without a token."""
        m = memory.shape[1]
        tokens_B = jnp.any(layout.document_BST[:, 0, m:-m] > 0, axis=-1)
        after_BmD = y_BSTD[:, 0, -m:].astype(jnp.float32)
        return y_BSTD[:, :, m:-m], self.select_lanes(tokens_B, after_BmD, memory)

    def finish_segment(
        self, memory: Memory, block_parameters: None, inputs_LBTD: None, token_BT: jax.Array, ends_BmD: jax.Array
    ) -> Memory:
        """The back memory tokens, those of `after_blocks`."""
        return ends_BmD.astype(jnp.float32)

    def as_slots(self, memory: Memory) -> jax.Array:
        """The memory tokens."""
        return memory[None]

    def attention_to_slots(self, sown: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Tokens attend to the front memory tokens; the back ones, which become the memory, attend to the tokens."""
        m = self.spec.memory.num_slots
        weights_LBUU = sown["blocks"]["attention"]["weights"][0]
        return weights_LBUU[:, :, m:-m, :m], weights_LBUU[:, :, -m:, m:-m]
