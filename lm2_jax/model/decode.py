"""Reading a segment token by token: `DecodeState`, and what moves it on.

Reading a segment takes three kinds of call, each for many rows; every row has its own position within its segment:

    init_decode_state -> append_tokens, as often as there are tokens -> finish_segment, which writes the memory
                         ^                                            |
                         +--------------- the next segment -----------+

The functions take a bound decoder: `model.apply({"params": params}, *arguments, method=append_tokens)`. Layers run one
by one, each with arrays of its own: sliced from a stack in a loop, caches would be copied for every token. `by_layer`
gives parameters that form, too.

Axes: B rows, Q tokens at a time, T tokens in a segment, D model width, C cached positions, m memory tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lm2_jax.model.block import Block
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.edge import join_edges, next_edge, split_edges
from lm2_jax.model.layers import KVCache, Layout
from lm2_jax.model.memory.base import Memory


@struct.dataclass
class DecodeState:
    """Rows in the middle of a segment.

    Attributes:
      memory: at the segment's start.
      memory_cache: what each block with a bank reads of it, computed once a segment by `MemoryKind.project_memory`.
      caches: name of a stack of blocks -> cache of each layer for the segment so far.
      count_B: int32, tokens in the unfinished segment.
      read_B: int32, tokens since the document's start.
      segment_length: static; T.
    """

    memory: Memory
    memory_cache: list[Any]
    caches: dict[str, list[KVCache]]
    count_B: jax.Array
    read_B: jax.Array
    segment_length: int = struct.field(pytree_node=False)


def stack(layers: Sequence[Any]) -> Any:
    """One tree of stacked arrays [L,...] from those of L layers."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def unstack(stacked: Any, count: int) -> list[Any]:
    """Undoes `stack`, for `count` layers."""

    def layer(i: int) -> Any:
        return jax.tree.map(lambda x: x[i], stacked)

    return [layer(i) for i in range(count)]


def by_layer(model: Decoder, params: Any) -> Any:
    """Parameters whose stacks are dicts of layers, "0" and so on, with matrices in the dtype of activations."""

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(model.spec.dtype) if leaf.ndim > 1 else leaf

    def split(name: str, tree: Any) -> Any:
        layers = {str(i): layer for i, layer in enumerate(unstack(tree, model.stacks.get(name, 0)))}
        is_memory = name in model.kind.parameters()
        return tree if is_memory else jax.tree.map(cast, layers or tree)

    return {name: split(name, tree) for name, tree in params.items()}


def init_decode_state(decoder: Decoder, memory: Memory, batch_size: int, segment_length: int) -> DecodeState:
    """The state of `batch_size` rows at a document's start, about to read segments of `segment_length` tokens."""
    c, dtype = decoder.spec.model, decoder.spec.dtype
    kind = decoder.kind
    cache_size = segment_length + sum(kind.num_memory_tokens)

    def empty_cache(keeps_inputs: bool) -> KVCache:
        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros((batch_size, *shape), dtype)

        return KVCache(
            keys_BGCK=zeros(c.num_kv_heads, cache_size, c.attention_head_dim),
            values_BGCK=zeros(c.num_kv_heads, cache_size, c.attention_head_dim),
            inputs_BCD=zeros(cache_size, c.d_model) if keeps_inputs else None,
            tail_BWD=zeros(c.conv_width - 1, c.d_model) if c.conv_width else None,
        )

    zeros_B = jnp.zeros(batch_size, jnp.int32)
    state = DecodeState(
        memory=memory,
        memory_cache=[],
        caches={
            name: [empty_cache(name == "bank_blocks" and not kind.decodes_in_place)] * layers
            for name, layers in decoder.stacks.items()
        },
        count_B=zeros_B,
        read_B=zeros_B,
        segment_length=segment_length,
    )
    state = refresh_memory_cache(decoder, state)
    return _append_front(decoder, jnp.ones(batch_size, bool), state)


def append_tokens(
    decoder: Decoder, tokens_BQ: jax.Array, count_B: jax.Array, state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """Appends tokens to unfinished segments; hidden states equal those that `Decoder.window` gives for whole ones.

    Args:
      tokens_BQ: int32 token ids, each row padded on its right.
      count_B: int32, how many of a row are not padding; they must fit into its segment.

    Returns:
      hidden states after the final norm [B,Q,D] (without meaning for padding), and the state after the tokens.
    """
    front, _ = decoder.kind.num_memory_tokens
    position_BQ = state.count_B[:, None] + jnp.arange(tokens_BQ.shape[1])
    x_BQD, first_B = decoder.embed(tokens_BQ), front + state.count_B
    hidden_BQD, state = _append(decoder, x_BQD, position_BQ, first_B, count_B, state)
    return hidden_BQD, state.replace(count_B=state.count_B + count_B, read_B=state.read_B + count_B)


def finish_segment(decoder: Decoder, rows_B: jax.Array, state: DecodeState) -> DecodeState:
    """Writes the memory of the selected rows from their segments, and starts their next ones. Other rows stay."""
    kind, T = decoder.kind, state.segment_length
    (front, back), ends_BmD, inputs_LBTD = kind.num_memory_tokens, None, None
    if back:
        ends_BmD, state = _append_memory(decoder, rows_B, front + state.count_B, state, back)
    if "bank_blocks" in state.caches and not kind.decodes_in_place:
        inputs_LBTD = jnp.stack([cache.inputs_BCD[:, front : front + T] for cache in state.caches["bank_blocks"]])
    token_BT = jnp.arange(T) < state.count_B[:, None]
    memory, edges = split_edges(state.memory)
    written = kind.finish_segment(memory, _bank_parameters(decoder), inputs_LBTD, token_BT, ends_BmD)
    for name, edge in edges.items():
        caches = state.caches[name]
        keys_LBTGK, values_LBTGK = stack([(c.keys_BGCK.swapaxes(1, 2), c.values_BGCK.swapaxes(1, 2)) for c in caches])
        next_edges = jax.vmap(next_edge, in_axes=(0, 0, 0, None))
        edges = edges | {name: next_edges(edge, keys_LBTGK, values_LBTGK, token_BT.astype(jnp.int32))}
    return _start_segment(decoder, rows_B, join_edges(written, edges), state)


def restart(decoder: Decoder, rows_B: jax.Array, state: DecodeState) -> DecodeState:
    """Puts the selected rows at a document's start. Other rows stay."""
    memory = decoder.init_memory(len(rows_B), decoder.variables["params"])
    state = _start_segment(decoder, rows_B, memory, state)
    return state.replace(read_B=jnp.where(rows_B, 0, state.read_B))


def _start_segment(decoder: Decoder, rows_B: jax.Array, memory: Memory, state: DecodeState) -> DecodeState:
    """Gives the selected rows this memory and an empty segment."""
    memory = decoder.select_lanes(rows_B, memory, state.memory)
    state = state.replace(memory=memory, count_B=jnp.where(rows_B, 0, state.count_B))
    return _append_front(decoder, rows_B, refresh_memory_cache(decoder, state))


def refresh_memory_cache(decoder: Decoder, state: DecodeState) -> DecodeState:
    """Recomputes the cached read projections of the memory."""
    memory, _ = split_edges(state.memory)
    projected = decoder.kind.project_memory(memory, _bank_parameters(decoder))
    return state.replace(memory_cache=unstack(projected, decoder.kind.num_bank_layers))


def _layers(decoder: Decoder, name: str) -> list[Any]:
    """The parameters of each layer of a stack."""
    layers = decoder.variables["params"][name]
    if "0" not in layers:
        layers = by_layer(decoder, {name: layers})[name]
    return [layers[str(i)] for i in range(decoder.stacks[name])]


def _bank_parameters(decoder: Decoder) -> Any:
    if "bank_blocks" not in decoder.stacks:
        return None
    return stack([layer["memory"] for layer in _layers(decoder, "bank_blocks")])


def _append_front(decoder: Decoder, rows_B: jax.Array, state: DecodeState) -> DecodeState:
    """Begins a segment in the selected rows: with its front memory tokens, if the kind has any."""
    if decoder.kind.num_memory_tokens[0]:
        _, state = _append_memory(decoder, rows_B, jnp.zeros_like(state.count_B), state)
    return state


def _append_memory(
    decoder: Decoder, rows_B: jax.Array, first_B: jax.Array, state: DecodeState, writing: int = 0
) -> tuple[jax.Array, DecodeState]:
    """Runs the memory tokens in the selected rows, at RoPE position 0; `writing` is `Layout.memory_tokens`."""
    x_BmD = decoder.kind.memory_tokens(decoder.memory_parameters, state.memory).astype(decoder.spec.dtype)
    m = x_BmD.shape[1]
    return _append(decoder, x_BmD, jnp.zeros(x_BmD.shape[:2], jnp.int32), first_B, m * rows_B, state, writing)


def _append(
    decoder: Decoder,
    x_BQD: jax.Array,
    position_BQ: jax.Array,
    first_B: jax.Array,
    count_B: jax.Array,
    state: DecodeState,
    writing: int = 0,
) -> tuple[jax.Array, DecodeState]:
    """Runs count_B of the Q embeddings of each row, whose indices in the cache start at first_B."""
    in_place = decoder.kind.decodes_in_place
    step_Q = jnp.arange(x_BQD.shape[1])
    real_BQ = step_Q < count_B[:, None]
    cache_size = state.segment_length + sum(decoder.kind.num_memory_tokens)
    layout = Layout(
        document_BST=real_BQ[:, None].astype(jnp.int32),
        position_BST=position_BQ[:, None],
        reset_BS=jnp.zeros((x_BQD.shape[0], 1), bool),
        packed=False,
        memory_tokens=writing,
        cache_index_BST=jnp.where(real_BQ, first_B[:, None] + step_Q, cache_size)[:, None],
    )
    x_B1QD, caches, (memory, edges) = x_BQD[:, None], {}, split_edges(state.memory)
    banks = unstack(memory, decoder.kind.num_bank_layers) if in_place else state.memory_cache
    for name in decoder.stacks:
        count, with_bank, caches[name], after = decoder.stacks[name], name == "bank_blocks", [], []
        block = Block(decoder.spec, decoder.kind, with_bank, parent=None)
        own = banks if with_bank else [None] * count, state.caches[name], unstack(edges.get(name), count)
        for params, bank, cache, edge in zip(_layers(decoder, name), *own, strict=True):
            (x_B1QD, _), (bank, cache, _) = block.apply({"params": params}, (x_B1QD, None), bank, layout, cache, edge)
            caches[name].append(cache)
            after.append(bank)
        if with_bank and in_place:
            state = state.replace(memory=join_edges(stack(after), edges))
    return decoder.final_norm(x_B1QD)[:, 0], state.replace(caches=caches)
