"""The training objective: cross-entropy over a window, divided by the global number of tokens that count.

Axes: B lanes, S segments, T tokens, N tokens of all of these, D model width, V vocabulary, C vocabulary chunks,
R rows of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm2_jax.batch import Batch
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.fsdp import all_gather_params, per_device

GatherChunk = Callable[[jax.Array], jax.Array]

_SHARES = (32, 16, 8, 4, 2, 1)  # of a window's tokens, as divisors
_MOST_LOGITS = 2**26  # held on one device at a time: 256 MiB in float32


@chex.dataclass(frozen=True)
class LossSums:
    """Sums over a batch; they add up over microbatches and validation windows.

    Attributes:
      loss: the objective (the weights already include the division by the global counts).
      nll: negative log-likelihood in nats over all tokens.
      tokens: tokens that were predicted.
      correct: answer tokens that were the argmax (ties count as correct).
      answers: answer tokens.
    """

    loss: jax.Array
    nll: jax.Array
    tokens: jax.Array
    correct: jax.Array
    answers: jax.Array

    @classmethod
    def zero(cls) -> LossSums:
        """Sums over nothing."""
        count = jnp.zeros((), jnp.int32)
        return cls(loss=jnp.zeros(()), nll=jnp.zeros(()), tokens=count, correct=count, answers=count)


class TokenTargets(NamedTuple):
    """Target of each token and its part in the sums, arrays [N] or [B,S,T].

    Attributes:
      target: int32 id of the next token.
      is_token: bool, counted in `nll` and `tokens`.
      is_answer: bool, counted in `correct` and `answers`.
      weight: float32, in the objective.
    """

    target: jax.Array
    is_token: jax.Array
    is_answer: jax.Array
    weight: jax.Array


CrossEntropy = Callable[[jax.Array, jax.Array, TokenTargets], LossSums]


def loss_weights(batch: Batch, lm_loss_weight: float) -> jax.Array:
    """Weight of every position in the objective, float32 [B,S,T], computed on the global batch before it is split.

    objective = mean over answer tokens + lm_loss_weight · mean over all tokens (the first is absent without answers).
    """
    token_BST = (batch.document_BST > 0).astype(jnp.float32)
    answer_BST = batch.answers_BST.astype(jnp.float32)
    token_weight = lm_loss_weight / jnp.maximum(jnp.sum(token_BST), 1)
    answer_weight = 1 / jnp.maximum(jnp.sum(answer_BST), 1)
    return token_weight * token_BST + answer_weight * answer_BST


def window_loss(
    model: Decoder,
    params: Any,
    hidden_BSTD: jax.Array,
    batch: Batch,
    weights_BST: jax.Array,
    weighted_only: bool = False,
) -> LossSums:
    """Projects hidden states to the vocabulary and adds up the loss.

    weighted_only: tokens of weight 0 are not counted, and most of them are not projected.

    The vocabulary is processed in chunks (twice when a gradient is needed), so the full logits, the full output
    embedding and its full gradient are never materialised.
    """
    table_VD = model.apply({"params": params}, method=Decoder.output_table)
    is_token_BST = weights_BST > 0 if weighted_only else batch.document_BST > 0
    targets = TokenTargets(batch.targets_BST, is_token_BST, batch.answers_BST, weights_BST)
    most_B = jnp.full(len(weights_BST), jnp.max(jnp.sum(is_token_BST, axis=(1, 2))))  # tokens that count in a lane

    def run(shards: Any, specs: Any, arrays: Any) -> tuple[LossSums, Any]:
        *tokens, most_B = arrays
        hidden_ND, targets_N = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), tokens)
        gather = functools.partial(all_gather_params, specs=specs, dtype=model.spec.dtype)
        cross_entropy = functools.partial(chunked_cross_entropy, gather)
        if weighted_only:
            cross_entropy = of_counted_tokens(cross_entropy, most_B[0] * len(most_B))
        sums = cross_entropy(hidden_ND, shards, targets_N)
        return jax.tree.map(lambda a: a[None, None, None], sums), {}

    sums, _ = per_device(run, table_VD, PartitionSpec("vocab", "embed"), (hidden_BSTD, targets, most_B))
    return jax.tree.map(jnp.sum, sums)


def of_counted_tokens(cross_entropy: CrossEntropy, most: jax.Array) -> CrossEntropy:
    """The same sums, computed from the smallest of a few shares of the N tokens that holds all that count.

    most: at least their number, the same on every device, so that all of them take the same share.
    """

    def run(hidden_ND: jax.Array, shard_VD: jax.Array, targets_N: TokenTargets) -> LossSums:
        N = len(hidden_ND)
        counted_first_N = jnp.argsort(~targets_N.is_token, stable=True)

        def share(size: int) -> Callable[[jax.Array, jax.Array], LossSums]:
            first = counted_first_N[:size]
            return lambda hidden_ND, shard_VD: cross_entropy(
                hidden_ND[first], shard_VD, jax.tree.map(lambda a: a[first], targets_N)
            )

        sizes = [N // divisor for divisor in _SHARES if N // divisor]
        smallest = jnp.sum(most > jnp.array(sizes[:-1], jnp.int32))
        return jax.lax.switch(smallest, [share(size) for size in sizes], hidden_ND, shard_VD)

    return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_cross_entropy(
    gather: GatherChunk, hidden_ND: jax.Array, shard_VD: jax.Array, targets_N: TokenTargets
) -> LossSums:
    """Sums over N tokens.

    Args:
      gather: turns this device's shard of some rows of the output embedding into these whole rows.
      shard_VD: this device's shard of the output embedding.
    """
    return _sums(gather, hidden_ND, shard_VD, targets_N)[0]


def _sums(
    gather: GatherChunk, hidden_ND: jax.Array, shard_VD: jax.Array, targets_N: TokenTargets
) -> tuple[LossSums, jax.Array]:
    """The sums, and log Σ exp of every token's logits [N]."""
    target_N, is_token_N, is_answer_N, weight_N = targets_N
    index_C, shards_CRD = _chunks(shard_VD, len(target_N))
    C = len(index_C)

    def chunk(carry: tuple[jax.Array, ...], inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        (max_N, sum_N, at_target_N), (index, shard_RD) = carry, inputs
        logits_NR = _logits(hidden_ND, gather(shard_RD), index, C, len(shard_VD))
        new_max_N = jnp.maximum(max_N, jnp.max(logits_NR, axis=-1))
        sum_N = sum_N * jnp.exp(max_N - new_max_N) + jnp.sum(jnp.exp(logits_NR - new_max_N[:, None]), axis=-1)
        here_N = jnp.take_along_axis(logits_NR, target_N[:, None] // C, axis=-1)[:, 0]
        return (new_max_N, sum_N, jnp.where(target_N % C == index, here_N, at_target_N)), None

    zero_N = jnp.zeros(len(target_N))
    (max_N, sum_N, at_target_N), _ = jax.lax.scan(chunk, (zero_N - jnp.inf, zero_N, zero_N), (index_C, shards_CRD))
    log_sum_N = max_N + jnp.log(sum_N)
    nll_N = log_sum_N - at_target_N
    sums = LossSums(
        loss=jnp.sum(weight_N * nll_N),
        nll=jnp.sum(jnp.where(is_token_N, nll_N, 0)),
        tokens=jnp.sum(is_token_N),
        correct=jnp.sum(is_answer_N & (at_target_N >= max_N)),
        answers=jnp.sum(is_answer_N),
    )
    return sums, log_sum_N


def _forward(
    gather: GatherChunk, hidden_ND: jax.Array, shard_VD: jax.Array, targets_N: TokenTargets
) -> tuple[LossSums, tuple[jax.Array, jax.Array, TokenTargets, jax.Array]]:
    sums, log_sum_N = _sums(gather, hidden_ND, shard_VD, targets_N)
    return sums, (hidden_ND, shard_VD, targets_N, log_sum_N)


def _gradient(
    gather: GatherChunk, saved: tuple[jax.Array, jax.Array, TokenTargets, jax.Array], d_sums: LossSums
) -> tuple[jax.Array, jax.Array, None]:
    """VJP of `loss` with respect to the hidden states and this device's shard of the output embedding.

    The other sums are metrics without a gradient.
    """
    hidden_ND, shard_VD, targets_N, log_sum_N = saved
    target_N, weight_N = targets_N.target, targets_N.weight * d_sums.loss
    index_C, shards_CRD = _chunks(shard_VD, len(target_N))
    C = len(index_C)

    def chunk(d_hidden_ND: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, shard_RD = inputs
        table_RD, reduce_gradient = jax.vjp(gather, shard_RD)
        stored_dtype = table_RD.dtype
        logits_NR = _logits(hidden_ND, table_RD, index, C, len(shard_VD))
        is_target_NR = jnp.arange(logits_NR.shape[1]) * C + index == target_N[:, None]
        d_logits_NR = (jnp.exp(logits_NR - log_sum_N[:, None]) - is_target_NR) * weight_N[:, None]
        d_logits_NR = d_logits_NR.astype(hidden_ND.dtype)
        table_RD = table_RD.astype(hidden_ND.dtype)
        d_hidden_ND += jnp.einsum("nr,rd->nd", d_logits_NR, table_RD, preferred_element_type=jnp.float32)
        d_table_RD = jnp.einsum("nr,nd->rd", d_logits_NR, hidden_ND, preferred_element_type=jnp.float32)
        return d_hidden_ND, reduce_gradient(d_table_RD.astype(stored_dtype))[0]

    d_hidden_ND, d_shards_CRD = jax.lax.scan(chunk, jnp.zeros(hidden_ND.shape), (index_C, shards_CRD))
    d_shard_VD = d_shards_CRD.swapaxes(0, 1).reshape(-1, shard_VD.shape[1])[: len(shard_VD)]
    return d_hidden_ND.astype(hidden_ND.dtype), d_shard_VD, None


chunked_cross_entropy.defvjp(_forward, _gradient)


def _chunks(shard_VD: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Chunk indices [C] and rows [C,R,D]: row r of chunk i is row r · C + i of the table, or padding.

    With this interleaving, every chunk of a table whose rows are sharded over `tensor` is spread evenly over that axis.
    """
    V, D = shard_VD.shape
    C = -(-V * tokens // _MOST_LOGITS)
    rows_VD = jnp.pad(shard_VD, ((0, -V % C), (0, 0)))
    return jnp.arange(C), rows_VD.reshape(-1, C, D).swapaxes(0, 1)


def _logits(hidden_ND: jax.Array, table_RD: jax.Array, index: jax.Array, C: int, vocab_size: int) -> jax.Array:
    """Logits [N,R] of a chunk, float32; padding has -inf."""
    table_RD = table_RD.astype(hidden_ND.dtype)
    logits_NR = jnp.einsum("nd,rd->nr", hidden_ND, table_RD, preferred_element_type=jnp.float32)
    if vocab_size % C == 0:
        return logits_NR
    return jnp.where(jnp.arange(len(table_RD)) * C + index < vocab_size, logits_NR, -jnp.inf)
