"""Attention to a range of the keys that is known when the program runs, not when it is compiled.

On TPUs it is JAX's splash attention, which visits the tiles of keys that some query of a tile sees; elsewhere it is
written out. There are three forms:

    `attend_to_prefix`: each query sees the keys up to one of them;
    `attend`, `gradient`, `join`: a part of a softmax, over some of its keys, with the log of what it was divided by, so
      that parts can be joined; the gradient of a part is that of the whole softmax, given the whole's result;
    `attend_to_either`: one of two sets of keys, of which the later queries see the second.

Axes: N rows, Q queries, U keys, G kv heads, R query heads of a kv head, H heads, K head width; I and J tiles of queries
and of keys. Tokens are the second to last axis of arrays whose names begin with NG.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from lm2_jax.model.attention import has_tiles, on_tpu, tile_sizes

_HIDDEN = jnp.finfo(jnp.float32).min  # score of a key that a query does not see


def can_choose_tiles(queries: int, keys: int, head_width: int) -> bool:
    """True if the kernel is there, takes arrays of these sizes, and need not be spread over devices by the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    on_one_device = all(size == 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)
    return on_tpu() and on_one_device and has_tiles(queries, keys, head_width)


class Queries(NamedTuple):
    """Queries, divided by √K.

    Attributes:
      q_NGRQK: of a model's dtype.
      document_NQ1: int32 document ids.
    """

    q_NGRQK: jax.Array
    document_NQ1: jax.Array


class Keys(NamedTuple):
    """Keys and values; queries attend to those of their own document.

    Attributes:
      k_NGUK, v_NGUK: of a model's dtype.
      document_NU1: int32 document ids.
    """

    k_NGUK: jax.Array
    v_NGUK: jax.Array
    document_NU1: jax.Array


class Part(NamedTuple):
    """The softmax over some keys.

    Attributes:
      out_NGRQK: float32, values by their weights; without meaning, and perhaps not finite, where no key is seen.
      log_sum_NGRQ1: float32, log Σ exp of the scores; -inf or very low where no key is seen.
    """

    out_NGRQK: jax.Array
    log_sum_NGRQ1: jax.Array


def join(a: Part, b: Part) -> Part:
    """The softmax over the keys of both; every query sees one of them."""
    log_sum = jnp.logaddexp(a.log_sum_NGRQ1, b.log_sum_NGRQ1)

    def share(part: Part) -> jax.Array:
        weight = jnp.exp(part.log_sum_NGRQ1 - log_sum)
        return jnp.where(weight > 0, weight * part.out_NGRQK, 0)

    return Part(share(a) + share(b), log_sum)


def attend_to_prefix(queries: Queries, keys: Keys, last_Q: jax.Array) -> jax.Array:
    """Values by their weights, [N,G,R,Q,K]; every query sees a key. last_Q: see `attend`."""
    if can_choose_tiles(queries.q_NGRQK.shape[-2], keys.k_NGUK.shape[-2], keys.k_NGUK.shape[-1]):
        return _run(_of_prefix(last_Q, keys, save_residuals=False), queries, keys)
    return attend(queries, keys, last_Q).out_NGRQK.astype(queries.q_NGRQK.dtype)


def attend(queries: Queries, keys: Keys, last_Q: jax.Array) -> Part:
    """The part of these keys. On TPUs it has no gradient: `gradient` is to be given instead.

    last_Q: int32 index of the last key that a query sees, of its document; -1: none. It never falls.
    """
    if can_choose_tiles(queries.q_NGRQK.shape[-2], keys.k_NGUK.shape[-2], keys.k_NGUK.shape[-1]):
        return splash_part(queries, keys, last_Q)
    scores_NGRQU = _scores(queries, keys, last_Q)
    log_sum_NGRQ1 = jax.nn.logsumexp(scores_NGRQU, axis=-1, keepdims=True)
    weights_NGRQU = jnp.exp(scores_NGRQU - log_sum_NGRQ1).astype(keys.v_NGUK.dtype)
    return Part(_product("ngrqu,nguk->ngrqk", weights_NGRQU, keys.v_NGUK), log_sum_NGRQ1)


def gradient(
    queries: Queries, keys: Keys, last_Q: jax.Array, whole: Part, d_out_NGRQK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shares of the gradients of queries, keys and values that are due to this part, float32.

    whole: over all keys. d_out_NGRQK: float32, the gradient of its result.
    """
    if can_choose_tiles(queries.q_NGRQK.shape[-2], keys.k_NGUK.shape[-2], keys.k_NGUK.shape[-1]):
        return splash_gradient(queries, keys, last_Q, whole, d_out_NGRQK)
    weights_NGRQU = jnp.exp(_scores(queries, keys, last_Q) - whole.log_sum_NGRQ1)
    d_weights_NGRQU = _product("ngrqk,nguk->ngrqu", d_out_NGRQK, keys.v_NGUK)
    d_scores_NGRQU = weights_NGRQU * (d_weights_NGRQU - jnp.sum(whole.out_NGRQK * d_out_NGRQK, -1, keepdims=True))
    d_q_NGRQK = _product("ngrqu,nguk->ngrqk", d_scores_NGRQU, keys.k_NGUK)
    d_k_NGUK = _product("ngrqu,ngrqk->nguk", d_scores_NGRQU, queries.q_NGRQK)
    return d_q_NGRQK, d_k_NGUK, _product("ngrqu,ngrqk->nguk", weights_NGRQU, d_out_NGRQK)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _scores(queries: Queries, keys: Keys, last_Q: jax.Array) -> jax.Array:
    visible_NQU = queries.document_NQ1 == keys.document_NU1.swapaxes(1, 2)
    visible_NQU &= jnp.arange(visible_NQU.shape[2]) <= last_Q[:, None]
    scores_NGRQU = _product("ngrqk,nguk->ngrqu", queries.q_NGRQK, keys.k_NGUK)
    return jnp.where(visible_NQU[:, None, None], scores_NGRQU, _HIDDEN)


# --- The kernel: JAX's, for the query heads of one kv head of one row ------------------------------------------------


def splash_part(queries: Queries, keys: Keys, last_Q: jax.Array, interpret: bool = False) -> Part:
    """`attend` by the kernel. interpret: run it where there is no TPU."""
    out_NGRQK, (log_sum_NGRQ,) = _run(_of_prefix(last_Q, keys, interpret), queries, keys)
    return Part(out_NGRQK.astype(jnp.float32), log_sum_NGRQ[..., None])


def splash_gradient(
    queries: Queries, keys: Keys, last_Q: jax.Array, whole: Part, d_out_NGRQK: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`gradient` by the kernel's backward pass, which has no public name in JAX 0.10 to 0.12."""
    kernel, dtype = _of_prefix(last_Q, keys, interpret), queries.q_NGRQK.dtype
    names = ("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function")
    static = (*(kernel.kwargs[name] for name in (*names, "attn_logits_soft_cap")), interpret)

    def run(q_k_v: tuple[jax.Array, ...], results: tuple[jax.Array, ...], d_out: jax.Array, ids: Any) -> Any:
        saved = (*q_k_v, ids, None, *results, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(*static, saved, d_out)[3:6]

    q_k_v, results = (*queries[:1], *keys[:2]), (whole.out_NGRQK.astype(dtype), whole.log_sum_NGRQ1[..., 0])
    run = jax.vmap(jax.vmap(run, in_axes=(0, 0, 0, None)))
    d_arrays = run(q_k_v, results, d_out_NGRQK.astype(dtype), _documents(queries, keys))
    return tuple(d.astype(jnp.float32) for d in d_arrays)


def _documents(queries: Queries, keys: Keys) -> splash.SegmentIds:
    return splash.SegmentIds(queries.document_NQ1[..., 0], keys.document_NU1[..., 0])


def _run(kernel: splash.SplashAttentionKernel, queries: Queries, keys: Keys) -> Any:
    of_rows = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))
    return of_rows(queries.q_NGRQK, keys.k_NGUK, keys.v_NGUK, _documents(queries, keys))


def _of_prefix(
    last_Q: jax.Array, keys: Keys, interpret: bool = False, save_residuals: bool = True
) -> splash.SplashAttentionKernel:
    U = keys.k_NGUK.shape[-2]
    sizes = tile_sizes(len(last_Q), U)
    last_I1 = last_Q[sizes.block_q - 1 :: sizes.block_q, None] // sizes.block_kv
    return _kernel(jnp.arange(U // sizes.block_kv) <= last_I1, last_Q, sizes, interpret, save_residuals)


def _kernel(
    visited_IJ: jax.Array, last_Q: jax.Array, sizes: splash.BlockSizes, interpret: bool, save_residuals: bool = False
) -> splash.SplashAttentionKernel:
    """The kernel for one kv head of one row.

    visited_IJ: bool; along either axis, what is visited is one run of tiles.
    last_Q: int32 index of the last key that a query sees in the tiles that it visits.
    """

    def info(axis: int) -> MaskInfo:
        """The tiles, with the one to fetch: of those that are visited the nearest, which is often there already."""
        size, index = visited_IJ.shape[axis], jnp.arange(visited_IJ.shape[axis])
        first, last = jnp.argmax(visited_IJ, axis), size - 1 - jnp.argmax(jnp.flip(visited_IJ, axis), axis)
        fetched_IJ = jnp.clip(jnp.expand_dims(index, 1 - axis), *(jnp.expand_dims(x, axis) for x in (first, last)))
        return MaskInfo(
            data_next=fetched_IJ[None].astype(jnp.int32),
            mask_next=None,
            block_mask=visited_IJ[None].astype(jnp.int32),
            partial_mask_blocks=None,
            q_sequence=last_Q,
        )

    return splash.SplashAttentionKernel(
        info(1),  # tiles of keys are fetched for the result and the gradient of queries
        info(1),
        info(0),
        is_mqa=True,
        block_sizes=sizes,
        save_residuals=save_residuals,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_is_seen,
        interpret=interpret,
    )


def _is_seen(last: jax.Array, key: jax.Array) -> jax.Array:
    return last >= key


# --- One of two sets of keys -----------------------------------------------------------------------------------------


def attend_to_either(
    q_NQHK: jax.Array,
    first: tuple[jax.Array, jax.Array],
    second: tuple[jax.Array, jax.Array],
    sees_second_NQ: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q kᵀ / √K) v, [N,Q,H,K], on TPUs: a tile of queries visits one set of keys, and one tile may visit both.

    Args:
      first: keys and values [N,U,H,K].
      second: keys and values [U,H,K], for all rows.
      sees_second_NQ: bool; of a row's queries, the later ones.
      interpret: run the kernel where there is no TPU.
    """
    N, Q, _, K = q_NQHK.shape
    U = first[0].shape[1]
    sizes = tile_sizes(Q, U)
    second = tuple(x.swapaxes(0, 1) for x in second)

    def row(inputs: tuple[jax.Array, ...]) -> jax.Array:
        q_QHK, keys_UHK, values_UHK, sees_second_Q = inputs
        q_H1QK = (q_QHK / np.sqrt(K)).astype(q_QHK.dtype).swapaxes(0, 1)[:, None]

        def attend_to(keys_and_values: tuple[jax.Array, ...], visits_I: jax.Array) -> jax.Array:
            visited_IJ = jnp.broadcast_to(visits_I[:, None], (len(visits_I), U // sizes.block_kv))
            kernel = _kernel(visited_IJ, jnp.full(Q, U - 1), sizes, interpret)
            return jax.vmap(kernel)(q_H1QK, *keys_and_values)[:, 0]

        of_tiles_IQ = sees_second_Q.reshape(-1, sizes.block_q)
        of_first_HQK = attend_to((keys_UHK.swapaxes(0, 1), values_UHK.swapaxes(0, 1)), ~of_tiles_IQ[:, 0])
        of_second_HQK = attend_to(second, of_tiles_IQ[:, -1])
        return jnp.where(sees_second_Q[:, None], of_second_HQK, of_first_HQK).swapaxes(0, 1)

    with jax.named_scope("either_attention"):
        rows = (q_NQHK, *first, sees_second_NQ)
        if N == 1:
            return row(jax.tree.map(lambda x: x[0], rows))[None]
        return jax.lax.map(row, rows)
