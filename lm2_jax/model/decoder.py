"""The decoder: Llama blocks around whatever memory the kind supplies.

Axes: B lanes, S segments, T tokens, D model width, V vocabulary, L layers. A window [B,S,T] runs through `window` layer
by layer; a single segment [B,T] through `__call__`. segments.py chooses between them. Token by token, a segment is read
with `begin`, `extend` and `finish`; decoding.py drives them.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lm2_jax.config import Config
from lm2_jax.model.layers import LOOKS, CausalConv, KVCache, Layout, RMSNorm, SelfAttention, SwiGLU, put
from lm2_jax.model.memory.base import Memory, MemoryKind, Parameters
from lm2_jax.parallel.fsdp import can_shard_batch, fetch, per_device, with_logical_constraint
from lm2_jax.parallel.mesh import unbox

# What a block keeps for the backward pass, its input, waits in the host's memory.
_INPUTS_ON_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["block_input"],
    offload_src="device",
    offload_dst="pinned_host",
)


class Block(nn.Module):
    """One layer over the S segments of a window; with a bank if `with_bank`."""

    config: Config
    kind: MemoryKind
    with_bank: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Memory], own_bank: Memory, layout: Layout, past: KVCache | None = None
    ) -> tuple[tuple[jax.Array, Memory], tuple[Memory, KVCache | None]]:
        """(x [B,S,T,D], a bank that passes through or None) and the block's own bank: before the window to after.

        With a past, x [B,1,T,D] follows it in an unfinished segment: the past grows, and what is readable of the bank
        stands for it.
        """
        x_BSTD, passing_bank = carry
        x_BSTD = checkpoint_name(x_BSTD, "block_input")
        carry = x_BSTD, passing_bank
        if can_shard_batch(x_BSTD.shape[0]) and layout.deterministic and not self.is_initializing():
            return self._on_own_lanes(carry, own_bank, layout, past)
        bank = own_bank if passing_bank is None else passing_bank
        if self.config.train.recomputes_segments and x_BSTD.shape[1] > 1:
            x_BSTD, bank = self._segment_by_segment(x_BSTD, bank, layout)
        else:
            x_BSTD, bank, past = self._window(x_BSTD, bank, layout, past)
        return ((x_BSTD, None), (bank, past)) if passing_bank is None else ((x_BSTD, bank), (None, past))

    def _on_own_lanes(self, *arrays: Any) -> Any:
        """The block, on every chip for the chip's own lanes."""
        unbound = self.clone(parent=None)

        def run(parts: Any, specs: Any, arrays: Any) -> tuple[Any, Any]:
            weights = fetch(parts, specs, self.config.train.dtype)
            outputs, sown = unbound.apply({"params": weights}, *arrays, mutable=["gates"])
            return outputs, sown.get("gates", {})

        axes = _logical_axes(self.config, self.kind, "bank_blocks" if self.with_bank else "blocks")
        outputs, gates = per_device(run, self.variables["params"], axes, arrays)
        for path, value in jax.tree_util.tree_leaves_with_path(gates):
            self.sow("gates", gate_name(path), value)
        return outputs

    def _window(
        self, x_BSTD: jax.Array, bank: Memory, layout: Layout, past: KVCache | None
    ) -> tuple[jax.Array, Memory, KVCache | None]:
        c = self.config.model
        if c.conv_width:
            normed_BSTD = RMSNorm(c.norm_eps, name="conv_norm")(x_BSTD)
            conv_BSTD, past = CausalConv(c.conv_width, name="conv")(normed_BSTD, layout, past)
            x_BSTD += conv_BSTD
        normed_BSTD = RMSNorm(c.norm_eps, name="attention_norm")(x_BSTD)
        attention = SelfAttention(c, self.kind.linear_init, name="attention")
        attended_BSTD, past = attention(normed_BSTD, layout, past)
        x_BSTD += attended_BSTD
        if self.with_bank:
            if past is not None:
                past = past.replace(inputs_BCD=put(past.inputs_BCD, normed_BSTD[:, 0], layout.cache_index_BST[:, 0]))
            added_BSTD, bank = self.kind.block_memory()(name="memory")(normed_BSTD, attended_BSTD, bank, layout)
            x_BSTD += added_BSTD
        normed_BSTD = RMSNorm(c.norm_eps, name="mlp_norm")(x_BSTD)
        x_BSTD += SwiGLU(c, self.kind.linear_init, name="mlp")(normed_BSTD)
        return with_logical_constraint(x_BSTD, "batch", None, None, "activation"), bank, past

    def _segment_by_segment(self, x_BSTD: jax.Array, bank: Memory, layout: Layout) -> tuple[jax.Array, Memory]:
        """The same, holding the activations of one segment at a time: only x and the bank of each are kept."""

        def segment(block: Block, bank: Memory, inputs: tuple[jax.Array, Layout]) -> tuple[Memory, jax.Array]:
            x_BTD, layout = inputs
            x_B1TD, bank, _ = block._window(x_BTD[:, None], bank, jax.tree.map(lambda a: a[:, None], layout), None)
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


def gate_name(path: tuple[Any, ...]) -> str:
    """Of a sown gate mean, by its path in the tree."""
    return next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))


@functools.cache
def _logical_axes(config: Config, kind: MemoryKind, stack: str) -> Any:
    """PartitionSpecs of logical axes of one layer of a stack of blocks."""
    model = Decoder(config, kind, parent=None)

    def init() -> Any:
        tokens_BT = jnp.zeros((1, config.data.segment_length), jnp.int32)
        return model.init_with_axes(jax.random.key(0), tokens_BT, model.init_memory(1))

    boxed = jax.eval_shape(init)
    specs = nn.get_partition_spec(boxed["params"][stack])
    return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs)


@struct.dataclass
class DecodeState:
    """Rows in the middle of a segment, each with a clock of its own.

    Attributes:
      memory: at the segment's start.
      readable: what blocks read of it, derived by `MemoryKind.readable`.
      past: name of the stack of blocks -> what is kept of the segment, each array with the layers L in front.
      count_B: int32, tokens in the unfinished segment.
      read_B: int32, tokens since the document's start.
      segment_length: static; T.
    """

    memory: Memory
    project_memory: Any
    past: dict[str, KVCache]
    count_B: jax.Array
    read_B: jax.Array
    segment_length: int = struct.field(pytree_node=False)


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
        remat = self.config.train.remat
        policy = _INPUTS_ON_HOST if remat == "offload" else None
        block = Block if remat == "none" else nn.remat(Block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "gates": 0, LOOKS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, 0),
            out_axes=0,
            length=length,
            unroll=self.config.train.unroll,
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
        x_BSTD = with_logical_constraint(x_BSTD, "batch", None, None, "activation")
        x_BSTD, layout, memory = self.kind.enter(self.memory_parameters, x_BSTD, layout, memory)
        x_BSTD, memory, _ = self._all_blocks(x_BSTD, memory, layout, {})
        return self.kind.leave(self.final_norm(x_BSTD), layout, memory)

    def _all_blocks(
        self, x_BSTD: jax.Array, memory: Memory, layout: Layout, past: dict[str, KVCache]
    ) -> tuple[jax.Array, Memory, dict[str, KVCache]]:
        past = dict(past)
        if self.bank_blocks is not None:
            passing, own = (memory, None) if self.kind.shares_one_bank else (None, memory)
            (x_BSTD, passing), (own, past["bank_blocks"]) = self.bank_blocks(
                (x_BSTD, passing), own, layout, past.get("bank_blocks")
            )
            memory = passing if self.kind.shares_one_bank else own
        if self.blocks is not None:
            (x_BSTD, _), (_, past["blocks"]) = self.blocks((x_BSTD, None), None, layout, past.get("blocks"))
        return x_BSTD, memory, past

    def begin(self, memory: Memory, batch_size: int, segment_length: int) -> DecodeState:
        """The unfinished segment of `segment_length` tokens that `batch_size` rows begin, at a document's start."""
        c, dtype, banks = self.config.model, self.config.train.dtype, self.kind.num_bank_layers
        places = segment_length + 2 * self.kind.num_memory_tokens

        def past(layers: int, with_bank: bool) -> KVCache:
            def zeros(*shape: int) -> jax.Array:
                return jnp.zeros((layers, batch_size, *shape), dtype)

            return KVCache(
                keys_BCGK=zeros(places, c.num_kv_heads, c.attention_head_dim),
                values_BCGK=zeros(places, c.num_kv_heads, c.attention_head_dim),
                inputs_BCD=zeros(places, c.d_model) if with_bank else None,
                tail_BWD=zeros(c.conv_width - 1, c.d_model) if c.conv_width else None,
            )

        stacks = {"bank_blocks": (banks, True), "blocks": (c.num_layers - banks, False)}
        nothing_B = jnp.zeros(batch_size, jnp.int32)
        state = DecodeState(
            memory=memory,
            project_memory=None,
            past={name: past(*stack) for name, stack in stacks.items() if stack[0]},
            count_B=nothing_B,
            read_B=nothing_B,
            segment_length=segment_length,
        )
        state = self.derive(state)
        if self.kind.num_memory_tokens:
            _, state = self._append_memory(jnp.ones(batch_size, bool), nothing_B, state)
        return state

    def extend(self, tokens_BQ: jax.Array, count_B: jax.Array, state: DecodeState) -> tuple[jax.Array, DecodeState]:
        """Reads on in unfinished segments; the same numbers as `window` gives over whole ones.

        Args:
          tokens_BQ: int32 token ids, each row padded on its right.
          count_B: int32, how many of a row are no padding; they must find room in its segment.

        Returns:
          hidden states after the final norm [B,Q,D] (without meaning for padding), and the state after the tokens.
        """
        m = self.kind.num_memory_tokens
        x_BQD = self.embedding.astype(self.config.train.dtype)[tokens_BQ]
        position_BQ = state.count_B[:, None] + jnp.arange(tokens_BQ.shape[1])
        hidden_BQD, state = self._append(x_BQD, position_BQ, m + state.count_B, count_B, state)
        return hidden_BQD, state.replace(count_B=state.count_B + count_B, read_B=state.read_B + count_B)

    def finish(self, rows_B: jax.Array, state: DecodeState) -> DecodeState:
        """Writes the memory of the chosen rows from their segments, and begins the next ones. Other rows stay."""
        m, T = self.kind.num_memory_tokens, state.segment_length
        ends_BmD, inputs_LBTD = None, None
        if m:
            ends_BmD, state = self._append_memory(rows_B, m + state.count_B, state)
        if self.bank_blocks is not None:
            inputs_LBTD = state.past["bank_blocks"].inputs_BCD[:, :, m : m + T]
        token_BT = jnp.arange(T) < state.count_B[:, None]
        written = self.kind.finish(state.memory, self._bank_parameters(), inputs_LBTD, token_BT, ends_BmD)
        state = state.replace(
            memory=self.kind.select_lanes(rows_B, written, state.memory), count_B=jnp.where(rows_B, 0, state.count_B)
        )
        state = self.derive(state)
        if m:
            _, state = self._append_memory(rows_B, jnp.zeros_like(state.count_B), state)
        return state

    def derive(self, state: DecodeState) -> DecodeState:
        """The state with what is readable of its memory."""
        return state.replace(project_memory=self.kind.project_memory(state.memory, self._bank_parameters()))

    def _bank_parameters(self) -> Any:
        return None if self.bank_blocks is None else self.variables["params"]["bank_blocks"]["memory"]

    def _append_memory(
        self, rows_B: jax.Array, first_B: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, DecodeState]:
        """Runs the memory tokens in the chosen rows, at RoPE position 0."""
        x_BmD = state.memory.astype(self.config.train.dtype)
        m = x_BmD.shape[1]
        return self._append(x_BmD, jnp.zeros(x_BmD.shape[:2], jnp.int32), first_B, m * rows_B, state)

    def _append(
        self, x_BQD: jax.Array, position_BQ: jax.Array, first_B: jax.Array, count_B: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, DecodeState]:
        """Runs count_B of the Q embeddings of each row, whose places begin at first_B."""
        step_Q = jnp.arange(x_BQD.shape[1])
        real_BQ = step_Q < count_B[:, None]
        places = state.segment_length + 2 * self.kind.num_memory_tokens
        layout = Layout(
            document_BST=real_BQ[:, None].astype(jnp.int32),
            position_BST=position_BQ[:, None],
            reset_BS=jnp.zeros((x_BQD.shape[0], 1), bool),
            packed=False,
            cache_index_BST=jnp.where(real_BQ, first_B[:, None] + step_Q, places)[:, None],
        )
        x_B1QD, _, past = self._all_blocks(x_BQD[:, None], state.project_memory, layout, state.past)
        return self.final_norm(x_B1QD)[:, 0], state.replace(past=past)

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
