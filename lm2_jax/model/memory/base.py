"""What a memory kind supplies; nothing else in the code asks which kind it is.

A kind answers three questions: what is the memory at a document's start, what does a block do with its part of it,
and what happens around a segment, read as a whole or token by token. The base class answers for `none`: a Llama without
memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.config import Config
from lm2_jax.model.layers import Initializer, Layout, linear_init

Memory = Any  # a pytree of float32 arrays
Parameters = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class MemoryKind:
    """No memory: every segment is read by itself.

    Attributes:
      config: the run's config.
      num_bank_layers: how many blocks, from the first, carry a bank.
      layer_by_layer: a block's bank depends on earlier segments only through this very bank, so a window may run layer
        by layer.
      bank_passes_through: one bank goes from block to block, instead of one bank for each.
      token_by_token: no logit depends on later tokens, so that a segment may be read bit by bit.
      num_memory_tokens: so many embeddings, the memory itself [B,m,D], stand before and after a segment's tokens.
      lane_axis: the axis of the lanes B in every leaf of the memory.
      linear_init: makes the initialiser of the blocks' weights; called as `layers.linear_init`.
    """

    config: Config
    supports_layer_schedule = True
    shares_one_bank = False
    is_causal = True
    lane_axis = 0
    linear_init = staticmethod(linear_init)

    @property
    def num_bank_layers(self) -> int:
        """Blocks that carry a bank."""
        return 0

    @property
    def num_memory_tokens(self) -> int:
        """Embeddings on either side of a segment's tokens."""
        return 0

    def parameters(self) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """Learned arrays of the memory outside the blocks: name to (initialiser, shape)."""
        return {}

    def initial(self, parameters: Parameters | None) -> Memory:
        """The memory of a lane at a document's start, without the lane axis; without parameters zeros of its shape."""
        return ()

    def block_memory(self) -> Callable[[], nn.Module] | None:
        """Makes the module that a block with a bank calls.

        Called with x' [B,S,T,D], what self-attention added to x, the bank and the layout; to (added to x, the bank).
        Where the layout has places, the segment is unfinished: what `readable` made of the bank stands for it, and None
        is given back.
        """
        return None

    def project_memory(self, memory: Memory, block_parameters: Any) -> Any:
        """What the blocks' modules read of the memory while a segment is unfinished; made once for all its tokens.

        Arrays begin with the axes [L,B]. block_parameters: as in `finish`.
        """
        return None

    def enter(
        self, parameters: Parameters, x_BSTD: jax.Array, layout: Layout, memory: Memory
    ) -> tuple[jax.Array, Layout, Memory]:
        """What the blocks see of the embedded tokens [B,S,T,D]."""
        return x_BSTD, layout, memory

    def leave(self, y_BSTD: jax.Array, layout: Layout, memory: Memory) -> tuple[jax.Array, Memory]:
        """The tokens' part of the last layer's output [B,S,T,D], and the memory after the segment."""
        return y_BSTD, memory

    def finish(
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
          token_BT: which of the T places hold a token.
          ends_BmD: what the last layer made of the back memory tokens; None without memory tokens.
        """
        return memory

    def slots(self, memory: Memory) -> jax.Array | None:
        """The memory as slots, for people to look at, float32 [L,B,N,M]; L = 1 where it passes through all layers.

        None: there is no memory.
        """
        return None

    def shares(self, looks: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
        """How a segment's tokens read the slots [L,B,T,N] and the slots the tokens [L,B,N,T], mean over heads, float32.

        What is missing to 1 in a row of the first goes elsewhere; the second is None where slots do not ask tokens.
        Not called where `slots` gives None.

        looks: what the blocks sowed into `layers.LOOKS` while they read the segment, by stack, module and name.
        """
        raise NotImplementedError

    def init_memory(self, batch_size: int, parameters: Parameters | None) -> Memory:
        """The memory of `batch_size` lanes, all at a document's start."""

        def every_lane(x: jax.Array) -> jax.Array:
            return jnp.repeat(jnp.expand_dims(x, self.lane_axis), batch_size, axis=self.lane_axis)

        return jax.tree.map(every_lane, self.initial(parameters))

    def select_lanes(self, take_B: jax.Array, taken: Memory, otherwise: Memory) -> Memory:
        """Lane by lane: `taken` where take_B, else `otherwise`; both memories of B lanes."""

        def choose(a: jax.Array, b: jax.Array) -> jax.Array:
            shape = [1] * b.ndim
            shape[self.lane_axis] = -1
            return jnp.where(take_B.reshape(shape), a, b)

        return jax.tree.map(choose, taken, otherwise)
