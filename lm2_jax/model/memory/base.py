"""The interface of a memory kind; nothing else in the code asks which kind it is.

A kind answers three questions: what is the memory at a document's start, what does a block do with its part of it,
and what happens around a segment, read as a whole or token by token. The base class is kind `none`: a Llama without
memory.

Axes: B lanes, S segments, T tokens, D model width, N memory slots, M slot width, m memory tokens, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.config.spec import ModelSpec
from lm2_jax.model.layers import Initializer, Layout, linear_init

Memory = Any  # a pytree of float32 arrays; with a window it has edges, too (model/edge.py)
Parameters = Mapping[str, jax.Array]


class BlockMemory(nn.Module):
    """A block's part of the memory: `before_attention`, `__call__` behind it, `after_feed_forward`.

    Each is given the bank and returns it; `__call__` is also given what `MemoryKind.prepare` made. By default it adds
    nothing to x and writes nothing. While a segment is unfinished (the layout has cache indices) the bank is what
    `MemoryKind.project_memory` made of it, and is not written, unless the kind decodes in place. A lane without tokens
    keeps its bank.
    """

    spec: ModelSpec

    def before_attention(self, x_BSTD: jax.Array, bank: Memory, layout: Layout) -> tuple[jax.Array, Memory]:
        """Takes the block's input x; returns x as the rest of the block sees it."""
        return x_BSTD, bank

    def __call__(self, x_BSTD: jax.Array, a_BSTD: jax.Array, bank: Memory, layout: Layout) -> tuple[jax.Array, Memory]:
        """Takes x', the normalised input of self-attention, and what that added to x; returns what is added, too."""
        return jnp.zeros_like(a_BSTD), bank

    def after_feed_forward(self, y_BSTD: jax.Array, bank: Memory, layout: Layout) -> Memory:
        """Takes the block's output."""
        return bank


@dataclasses.dataclass(frozen=True)
class MemoryKind:
    """No memory: every segment is read by itself.

    Attributes:
      spec: what the model depends on.
      num_bank_layers: number of blocks, from memory.first_layer on, that have a bank.
      supports_layer_schedule: a block's bank depends on earlier segments only through this very bank, so a window may
        run layer by layer.
      shares_one_bank: one bank is passed from block to block, instead of one for each.
      block_is_recurrent: what a block is given in a segment depends on what it returned in the segment before, so that
        within a block, too, one segment comes after the other.
      is_causal: no logit depends on later tokens, so a segment may be read token by token.
      decodes_in_place: while a segment is read token by token, its blocks are given the banks themselves, and what they
        return goes on to the next tokens; nothing is left for `project_memory` and `finish_segment` to do.
      lane_axis: the axis of the lanes B in every leaf of the memory.
      linear_init: makes the initialiser of the blocks' weights; has the signature of `layers.linear_init`.
    """

    spec: ModelSpec
    supports_layer_schedule = True
    shares_one_bank = False
    block_is_recurrent = False
    is_causal = True
    decodes_in_place = False
    lane_axis = 0
    linear_init = staticmethod(linear_init)

    @property
    def num_bank_layers(self) -> int:
        """Number of blocks with a bank."""
        return 0

    @property
    def num_memory_tokens(self) -> tuple[int, int]:
        """Numbers of memory tokens before and after a segment's tokens; the blocks see them as embeddings."""
        return 0, 0

    def memory_tokens(self, parameters: Parameters, memory: Memory) -> jax.Array:
        """The embeddings [B,m,D] that stand before a segment's tokens, after them, or both."""
        raise NotImplementedError

    def parameters(self) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """Learned arrays of the memory outside the blocks: name to (initialiser, shape)."""
        return {}

    def initial(self, parameters: Parameters | None) -> Memory:
        """The memory of one lane at a document's start; without parameters, zeros of its shape where it is learned."""
        return ()

    def block_memory(self) -> Callable[[], BlockMemory] | None:
        """Makes the module that a block with a bank calls."""
        return None

    def prepare(self, block_parameters: Parameters, layout: Layout) -> tuple[Any, ...]:
        """Makes what all segments of a window read alike: further arguments of `BlockMemory.__call__`.

        There, while a model is initialised, they are missing. block_parameters: of this block's `BlockMemory`.
        """
        return ()

    def project_memory(self, memory: Memory, block_parameters: Any) -> Any:
        """Projects the memory for the blocks to read while a segment is unfinished, once for all of its tokens.

        Arrays are [L,B,H,...], H heads. block_parameters: those of `finish_segment`.
        """
        return None

    def before_blocks(
        self, parameters: Parameters, x_BSTD: jax.Array, layout: Layout, memory: Memory
    ) -> tuple[jax.Array, Layout, Memory]:
        """Turns the embedded tokens [B,S,T,D] into what the blocks see."""
        return x_BSTD, layout, memory

    def after_blocks(self, y_BSTD: jax.Array, layout: Layout, memory: Memory) -> tuple[jax.Array, Memory]:
        """Takes the tokens' part of the last layer's output [B,S,T,D], and the memory after the segment, from it."""
        return y_BSTD, memory

    def finish_segment(
        self,
        memory: Memory,
        block_parameters: Any,
        inputs_LBTD: jax.Array | None,
        token_BT: jax.Array,
        ends_BmD: jax.Array | None,
    ) -> Memory:
        """The memory after a segment that was read token by token.

        Args:
          memory: at the segment's start.
          block_parameters: of the modules that `block_memory` makes, all layers stacked; None without banks.
          inputs_LBTD: x' of the blocks with a bank; None without banks.
          token_BT: bool, which of the T positions hold a token.
          ends_BmD: the last layer's output at the memory tokens after the segment's; None without any.
        """
        return memory

    def as_slots(self, memory: Memory) -> jax.Array | None:
        """The memory as slots for inspection, float32 [L,B,N,M]; L = 1 where one memory serves all layers.

        None: there is no memory.
        """
        return None

    def attention_to_slots(self, sown: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
        """Attention weights of a segment's tokens to the slots [L,B,T,N], and of the slots to the tokens [L,B,N,T].

        Both are means over heads, float32. Rows of the first may sum to less than 1: the rest attends to other keys.
        The second is None for kinds whose slots do not attend to tokens. Not called where `as_slots` gives None.

        sown: the collection "intermediates" of the blocks that read the segment, by stack, module and name.
        """
        raise NotImplementedError

    def init_memory(self, batch_size: int, parameters: Parameters | None) -> Memory:
        """The memory of `batch_size` lanes, all at a document's start."""

        def every_lane(x: jax.Array) -> jax.Array:
            return jnp.repeat(jnp.expand_dims(x, self.lane_axis), batch_size, axis=self.lane_axis)

        return jax.tree.map(every_lane, self.initial(parameters))

    def select_lanes(self, take_B: jax.Array, taken: Memory, otherwise: Memory) -> Memory:
        """Selects lane by lane: `taken` where take_B, else `otherwise`; both are memories of B lanes."""
        return select_lanes(self.lane_axis, take_B, taken, otherwise)


def select_lanes(lane_axis: int, take_B: jax.Array, taken: Memory, otherwise: Memory) -> Memory:
    """Selects lane by lane: `taken` where take_B, else `otherwise`, whose leaves have lanes at `lane_axis`."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        shape = [1] * b.ndim
        shape[lane_axis] = -1
        return jnp.where(take_B.reshape(shape), a, b)

    return jax.tree.map(choose, taken, otherwise)
