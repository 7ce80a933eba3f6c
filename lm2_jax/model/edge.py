"""Attention over the edge of a segment: what a layer carries from each segment to the next.

With `model.window` W and `model.sinks` n, token t of a document attends to the tokens s with t - W < s <= t, also to
those of earlier segments, and to the document's first n tokens (its sinks). W is at most a segment's length T.

What is carried. An `Edge` a layer: keys and values of the document's last W - 1 tokens and of its first n, and how many
tokens it has had. Keys are carried before RoPE rotates them. Carried tokens stand in the document's order with the
newest at the end, so the number of tokens alone tells which places are filled; the others hold zeros. A document's
start is an edge of no tokens. The edges of all layers travel with the memory (`WithEdges`) and are treated like it:
reset with a document, detached between windows, saved in checkpoints and memory files. Without a window there are none.

The recurrence. `next_edge` moves an edge past one segment. Its last document decides what is carried: it restarts the
edge if it began in the segment, and continues it otherwise, so sinks that a segment's end splits fill up over both.
The edge after a segment depends on that layer's keys and values alone. So both schedules use the same recurrence: layer
by layer it is a scan that only moves keys and values (`edges_of_window`), and attention runs for all segments at once.

Distances. Near keys are rotated by their places relative to the segment's start (carried ones to -1, -2, ...), so no
angle grows with the document. Sinks stand at their true distance, from places in the document, up to
`model.max_distance`; one that is farther stands at that distance. model/windowed.py computes the attention.

Axes: B lanes, S segments, T tokens, E = W - 1 carried tokens, n sinks, G kv heads, K head width, L layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lm2_jax.config import ModelConfig

MOST_TOKENS = 2**30  # counted of a document; a stream longer than this stays there


@struct.dataclass
class Edge:
    """Keys and values that one layer carries of the document that a lane is in.

    Attributes:
      keys_BEGK, values_BEGK: float32, of the document's last E tokens, the newest at the end.
      sink_keys_BnGK, sink_values_BnGK: float32, of its first n tokens; None without sinks.
      length_B: int32, its tokens so far.
    """

    keys_BEGK: jax.Array
    values_BEGK: jax.Array
    sink_keys_BnGK: jax.Array | None
    sink_values_BnGK: jax.Array | None
    length_B: jax.Array


@struct.dataclass
class WithEdges:
    """The memory of a model with a window.

    Attributes:
      memory: of the memory kind.
      edges: name of a stack of blocks -> edges of its layers; every array has the axes [L,B,...].
    """

    memory: Any
    edges: dict[str, Edge]


def split_edges(memory: Any) -> tuple[Any, dict[str, Edge]]:
    """The kind's own memory, and the edges; none without a window."""
    return (memory.memory, memory.edges) if isinstance(memory, WithEdges) else (memory, {})


def join_edges(memory: Any, edges: dict[str, Edge | None]) -> Any:
    """Undoes `split_edges`."""
    return WithEdges(memory, edges) if any(edges.values()) else memory


def initial_edge(config: ModelConfig, layers: int, batch_size: int) -> Edge:
    """The edges of `layers` layers at a document's start."""

    def zeros(tokens: int) -> jax.Array:
        return jnp.zeros((layers, batch_size, tokens, config.num_kv_heads, config.attention_head_dim))

    return Edge(
        keys_BEGK=zeros(config.window - 1),
        values_BEGK=zeros(config.window - 1),
        sink_keys_BnGK=zeros(config.sinks) if config.sinks else None,
        sink_values_BnGK=zeros(config.sinks) if config.sinks else None,
        length_B=jnp.zeros((layers, batch_size), jnp.int32),
    )


def next_edge(edge: Edge, k_BTGK: jax.Array, v_BTGK: jax.Array, document_BT: jax.Array) -> Edge:
    """The edge after a segment.

    Args:
      edge: at the segment's start.
      k_BTGK, v_BTGK: of the segment's tokens, before RoPE.
      document_BT: int32 document ids: 0 padding, which stands at the end; 1 the document of the edge; then 2, 3, ...
    """
    last_B = jnp.max(document_BT, axis=1)
    tokens_B = jnp.sum(document_BT > 0, axis=1)
    own_B = jnp.sum((document_BT == last_B[:, None]) & (document_BT > 0), axis=1)
    before_B = jnp.where(last_B > 1, 0, edge.length_B)
    length_B = jnp.minimum(before_B + own_B, MOST_TOKENS)

    E = edge.keys_BEGK.shape[1]
    newest_BE = tokens_B[:, None] + jnp.arange(E)
    filled_BE = jnp.arange(E) >= E - length_B[:, None]

    def newest(carried_BEGK: jax.Array, own_BTGK: jax.Array) -> jax.Array:
        joined = jnp.concatenate([carried_BEGK, own_BTGK.astype(carried_BEGK.dtype)], axis=1)
        return _where(filled_BE, jnp.take_along_axis(joined, newest_BE[..., None, None], axis=1), 0.0)

    def first(carried_BnGK: jax.Array | None, own_BTGK: jax.Array) -> jax.Array | None:
        if carried_BnGK is None:
            return None
        sink_n = jnp.arange(carried_BnGK.shape[1])
        first_Bn = jnp.clip((tokens_B - own_B - before_B)[:, None] + sink_n, 0, own_BTGK.shape[1] - 1)
        carried_Bn, filled_Bn = sink_n < before_B[:, None], sink_n < length_B[:, None]
        own_BnGK = jnp.take_along_axis(own_BTGK, first_Bn[..., None, None], axis=1).astype(carried_BnGK.dtype)
        return _where(filled_Bn, _where(carried_Bn, carried_BnGK, own_BnGK), 0.0)

    return Edge(
        keys_BEGK=newest(edge.keys_BEGK, k_BTGK),
        values_BEGK=newest(edge.values_BEGK, v_BTGK),
        sink_keys_BnGK=first(edge.sink_keys_BnGK, k_BTGK),
        sink_values_BnGK=first(edge.sink_values_BnGK, v_BTGK),
        length_B=length_B,
    )


def edges_of_window(
    edge: Edge, k_BSTGK: jax.Array, v_BSTGK: jax.Array, document_BST: jax.Array, reset_BS: jax.Array
) -> tuple[Edge, Edge]:
    """The edges that the segments of a window find, arrays [B,S,...], and the edge after the window.

    reset_BS: bool, the segment's first document starts here.
    """

    def step(edge: Edge, segment: tuple[jax.Array, ...]) -> tuple[Edge, Edge]:
        *tokens, reset_B = segment
        found = jax.tree.map(lambda x: jnp.where(reset_B.reshape(-1, *[1] * (x.ndim - 1)), 0, x), edge)
        return next_edge(found, *tokens), found

    by_segment = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (k_BSTGK, v_BSTGK, document_BST, reset_BS))
    edge, found = jax.lax.scan(step, edge, by_segment)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found), edge


def _where(chosen_Bt: jax.Array, x_BtGK: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    return jnp.where(chosen_Bt[..., None, None], x_BtGK, otherwise)
