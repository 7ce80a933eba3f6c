"""Self-attention with a window that reaches over segment edges, and with sinks (model/edge.py has the design).

A query attends, under one softmax, to near keys, which are the carried and the segment's own within the window, and to
sinks beyond the window. A sink within the window is one of the near keys. Sinks are carried, or the segment's own where
the window is shorter than the segment.

Axes: N rows (segments of lanes), Q queries, T tokens of a segment, E carried tokens, U = E + T near keys, J sinks,
H heads, G kv heads, K head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm2_jax.config import ModelConfig
from lm2_jax.model.attention import Sinks, masked_attention, scores, window_attention
from lm2_jax.model.edge import Edge, edges_of_window
from lm2_jax.model.layers import KVCache, Layout, SelfAttention, dense, rope_frequencies, rotate
from lm2_jax.model.lora import Weight


class Places(NamedTuple):
    """Places of tokens in their segment and in their document.

    Attributes:
      index_NT: int32, in the segment.
      document_NT: int32 document ids; see `Layout`.
      position_NT: int32, in the document.
    """

    index_NT: jax.Array
    document_NT: jax.Array
    position_NT: jax.Array


class WindowedAttention(SelfAttention):
    """`SelfAttention` that reaches over the segment's edge; the same parameters."""

    @nn.compact
    def __call__(
        self, x_BSTD: jax.Array, layout: Layout, edge: Edge, cache: KVCache | None = None
    ) -> tuple[jax.Array, Edge, KVCache | None]:
        """x [B,S,T,D] and the edge before the window to (what attention adds, the edge after it, the cache).

        With a cache, S = 1 and the T tokens continue the cached segment; the edge stays that at the segment's start.
        """
        c = self.config
        w_q, w_k, w_v, w_o = self.weights(x_BSTD.shape[-1])

        def heads(weight: Weight) -> jax.Array:
            return dense(x_BSTD, weight).reshape(*x_BSTD.shape[:3], -1, c.attention_head_dim)

        q_BSTHK, k_BSTGK, v_BSTGK = heads(w_q), heads(w_k), heads(w_v)
        if cache is None:
            found, edge = edges_of_window(edge, k_BSTGK, v_BSTGK, layout.document_BST, layout.reset_BS)
            attended = attend_segments(c, *_merge((q_BSTHK, k_BSTGK, v_BSTGK, layout.document_BST, found)))
        else:
            index_BT = layout.cache_index_BST[:, 0]
            cache = cache.append(k_BSTGK[:, 0], v_BSTGK[:, 0], index_BT)
            attended = attend_cache(c, q_BSTHK[:, 0], cache, layout.position_BST[:, 0], edge)
        return dense(attended.reshape(*x_BSTD.shape[:3], -1), w_o), edge, cache


def attend_segments(
    c: ModelConfig, q_NTHK: jax.Array, k_NTGK: jax.Array, v_NTGK: jax.Array, document_NT: jax.Array, edge: Edge
) -> jax.Array:
    """Attention of whole segments, [N,T,H,K]; q and k are not rotated, and `edge` is what each segment finds."""
    places = _places(document_NT, edge.length_B)
    keys, values, _, document_NU = _near(c, k_NTGK, v_NTGK, places, edge)
    sinks = _sinks(c, q_NTHK, places, k_NTGK, v_NTGK, places, edge)
    queries = _rotate(c, q_NTHK, places.index_NT)
    return window_attention(queries, keys, values, c.window, document_NT, document_NU, sinks)


def attend_cache(c: ModelConfig, q_BQHK: jax.Array, cache: KVCache, index_BQ: jax.Array, edge: Edge) -> jax.Array:
    """Attention of tokens at index_BQ of an unfinished segment, [B,Q,H,K]; the cached keys are not rotated."""
    k_BCGK, v_BCGK = cache.keys_BGCK.swapaxes(1, 2), cache.values_BGCK.swapaxes(1, 2)
    cached = _places(jnp.ones(k_BCGK.shape[:2], jnp.int32), edge.length_B)
    keys, values, index_BU, document_BU = _near(c, k_BCGK, v_BCGK, cached, edge)
    queries = Places(index_BQ, jnp.ones_like(index_BQ), edge.length_B[:, None] + index_BQ)
    sinks = _sinks(c, q_BQHK, queries, k_BCGK, v_BCGK, cached, edge)
    back_BQU = index_BQ[:, :, None] - index_BU[:, None]
    visible_BQU = (back_BQU >= 0) & (back_BQU < c.window) & (document_BU == 1)[:, None]
    return masked_attention(_rotate(c, q_BQHK, index_BQ), keys, values, visible_BQU, sinks)


def _places(document_NT: jax.Array, length_N: jax.Array) -> Places:
    """Places of a segment's tokens; document 1 had length_N tokens before."""
    index_NT = jnp.broadcast_to(jnp.arange(document_NT.shape[1]), document_NT.shape)
    begins_NT = jnp.pad(document_NT[:, 1:] != document_NT[:, :-1], ((0, 0), (1, 0)))
    first_NT = jax.lax.cummax(jnp.where(begins_NT, index_NT, 0), axis=1)
    before_NT = jnp.where(document_NT == 1, length_N[:, None], 0)
    return Places(index_NT, document_NT, before_NT + index_NT - first_NT)


def _near(
    c: ModelConfig, k_NTGK: jax.Array, v_NTGK: jax.Array, own: Places, edge: Edge
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Keys (rotated), values, index in the segment and document id of the carried tokens and the own ones."""
    N, E = edge.keys_BEGK.shape[:2]
    index_NE = jnp.broadcast_to(jnp.arange(-E, 0), (N, E))
    document_NE = jnp.where(-index_NE <= edge.length_B[:, None], 1, -1)  # -1: nobody's

    def join(carried: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.concatenate([carried.astype(own.dtype), own], axis=1)

    index_NU, document_NU = join(index_NE, own.index_NT), join(document_NE, own.document_NT)
    k_NUGK, v_NUGK = join(edge.keys_BEGK, k_NTGK), join(edge.values_BEGK, v_NTGK)
    return _rotate(c, k_NUGK, index_NU), v_NUGK, index_NU, document_NU


def _sinks(
    c: ModelConfig,
    q_NQHK: jax.Array,
    queries: Places,
    k_NTGK: jax.Array,
    v_NTGK: jax.Array,
    own: Places,
    edge: Edge,
) -> Sinks | None:
    """Scores and values of the sinks beyond the window; None without sinks."""
    if not c.sinks:
        return None
    N, n = edge.sink_keys_BnGK.shape[:2]
    position_Nn = jnp.broadcast_to(jnp.arange(n), (N, n))
    document_Nn = jnp.where(position_Nn < edge.length_B[:, None], 1, -1)  # -1: nobody's
    index_NJ, document_NJ = _own_sinks(c, own)

    def join(carried_NnGK: jax.Array, own_NTGK: jax.Array) -> jax.Array:
        own_NJGK = jnp.take_along_axis(own_NTGK, index_NJ[..., None, None], axis=1)
        return jnp.concatenate([carried_NnGK.astype(own_NTGK.dtype), own_NJGK], axis=1)

    k_NJGK = join(edge.sink_keys_BnGK, k_NTGK)
    document_NJ = jnp.concatenate([document_Nn, document_NJ], axis=1)
    position_NJ = jnp.concatenate([position_Nn, jnp.take_along_axis(own.position_NT, index_NJ, axis=1)], axis=1)

    distance_NQJ = queries.position_NT[:, :, None] - position_NJ[:, None]
    visible_NQJ = (queries.document_NT[:, :, None] == document_NJ[:, None]) & (distance_NQJ >= c.window)
    scores_NHQJ = scores(_rotate(c, q_NQHK, queries.position_NT), _rotate(c, k_NJGK, position_NJ))
    if c.max_distance is not None:
        farthest_NQ = jnp.full_like(queries.position_NT, c.max_distance)
        cut_NHQJ = scores(_rotate(c, q_NQHK, farthest_NQ), k_NJGK)
        scores_NHQJ = jnp.where((distance_NQJ > c.max_distance)[:, None], cut_NHQJ, scores_NHQJ)
    return Sinks(scores_NHQJ, visible_NQJ, document_NJ, join(edge.sink_values_BnGK, v_NTGK))


def _own_sinks(c: ModelConfig, own: Places) -> tuple[jax.Array, jax.Array]:
    """Index and document [N,J] of the segment's own sinks that one of its queries has beyond its window; -1: none.

    Only documents with more than W tokens in the segment have any, so J is at most n · floor(T / (W + 1)).
    """
    N, T = own.index_NT.shape
    J = c.sinks * (T // (c.window + 1))
    if not J:
        return jnp.zeros((N, 0), jnp.int32), jnp.zeros((N, 0), jnp.int32)
    same_NT = own.document_NT[:, : T - c.window] == own.document_NT[:, c.window :]
    needed_NT = jnp.pad(same_NT, ((0, 0), (0, c.window))) & (own.position_NT < c.sinks) & (own.document_NT > 0)
    left_NJ, index_NJ = jax.lax.top_k(jnp.where(needed_NT, T - own.index_NT, 0), J)
    document_NJ = jnp.take_along_axis(own.document_NT, index_NJ, axis=1)
    return index_NJ, jnp.where(left_NJ > 0, document_NJ, -1)


def _rotate(c: ModelConfig, x_NTHK: jax.Array, position_NT: jax.Array) -> jax.Array:
    return rotate(x_NTHK, position_NT, rope_frequencies(c.attention_head_dim, c.rope_theta, c.rope_scaling))


def _merge(arrays: tuple) -> tuple:
    """Arrays [B,S,...] as [N,...], every segment by itself."""
    return jax.tree.map(lambda x: x.reshape(math.prod(x.shape[:2]), *x.shape[2:]), arrays)
