"""What training minimises: cross-entropy over a window, divided by the global number of tokens that count.

Axes: B lanes, S segments, T tokens, N tokens of all of these, D model width, V vocabulary,
R rows of a piece of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.fsdp import fetch, per_device

Batch = Mapping[str, jax.Array]  # the arrays of data/lanes.py: tokens, targets, document, answers [B,S,T]; reset [B,S]

Columns = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
FetchPiece = Callable[[jax.Array], jax.Array]

_MOST_LOGITS = 2**26  # of a chip, held at once: 256 MiB


@chex.dataclass(frozen=True)
class LossSums:
    """Sums over a batch; they add up over microbatches and validation windows.

    Attributes:
      loss: the objective (with weights that already hold the division by the global counts).
      nll: negative log-likelihood in nats over all tokens.
      tokens: tokens that were predicted.
      correct: answer tokens than which none was likelier.
      answers: answer tokens.
    """

    loss: jax.Array
    nll: jax.Array
    tokens: jax.Array
    correct: jax.Array
    answers: jax.Array


def loss_weights(batch: Batch, lm_loss_weight: float) -> jax.Array:
    """Weight of every position in the objective, float32 [B,S,T]; take it of the global batch, before it is split.

    objective = mean over answer tokens + lm_loss_weight · mean over all tokens (the first is absent without answers).
    """
    token_BST = (batch["document_BST"] > 0).astype(jnp.float32)
    answer_BST = batch["answers_BST"].astype(jnp.float32)
    token_weight = lm_loss_weight / jnp.maximum(jnp.sum(token_BST), 1)
    answer_weight = 1 / jnp.maximum(jnp.sum(answer_BST), 1)
    return token_weight * token_BST + answer_weight * answer_BST


def window_loss(model: Decoder, params: Any, hidden_BSTD: jax.Array, batch: Batch, weights_BST: jax.Array) -> LossSums:
    """Projects hidden states to the vocabulary and adds up the loss.

    The vocabulary is gone through in pieces, twice where a gradient is wanted: neither all logits nor the whole table,
    nor the whole of its gradient, are ever held.
    """
    name = "embedding" if model.config.model.tie_embeddings else "head"
    columns = (batch["targets_BST"], batch["document_BST"] > 0, batch["answers_BST"], weights_BST)
    dtype = model.config.train.dtype

    def run(parts: Any, specs: Any, arrays: Any) -> tuple[LossSums, Any]:
        hidden_ND, columns = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), arrays)
        fetch_piece = functools.partial(fetch, specs=specs[name], dtype=dtype)
        sums = _token_loss(fetch_piece, hidden_ND, parts[name], columns)
        return jax.tree.map(lambda a: a[None], sums), {}

    axes = {name: PartitionSpec("vocab", "embed")}
    sums, _ = per_device(run, {name: params[name]}, axes, (hidden_BSTD, columns))
    return jax.tree.map(jnp.sum, sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_loss(fetch_piece: FetchPiece, hidden_ND: jax.Array, part_VD: jax.Array, columns: Columns) -> LossSums:
    """Sums over N tokens.

    Args:
      fetch_piece: from this chip's part of some rows of the table to these rows.
      part_VD: this chip's part of the table.
      columns: each [N]: targets, which are tokens, which are answers, weights in the objective.
    """
    return _sums(fetch_piece, hidden_ND, part_VD, columns)[0]


def _sums(
    fetch_piece: FetchPiece, hidden_ND: jax.Array, part_VD: jax.Array, columns: Columns
) -> tuple[LossSums, jax.Array]:
    """The sums, and log Σ exp of every token's logits [N]."""
    targets_N, token_N, answer_N, weights_N = columns
    numbers, parts = _pieces(part_VD, len(targets_N))
    pieces = len(numbers)

    def piece(carry: tuple[jax.Array, ...], inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        (most_N, sum_N, target_N), (number, part_RD) = carry, inputs
        logits_NR = _logits(hidden_ND, fetch_piece(part_RD), number, pieces, len(part_VD))
        higher_N = jnp.maximum(most_N, jnp.max(logits_NR, axis=-1))
        sum_N = sum_N * jnp.exp(most_N - higher_N) + jnp.sum(jnp.exp(logits_NR - higher_N[:, None]), axis=-1)
        mine_N = jnp.take_along_axis(logits_NR, targets_N[:, None] // pieces, axis=-1)[:, 0]
        return (higher_N, sum_N, jnp.where(targets_N % pieces == number, mine_N, target_N)), None

    zero_N = jnp.zeros(len(targets_N))
    (most_N, sum_N, target_N), _ = jax.lax.scan(piece, (zero_N - jnp.inf, zero_N, zero_N), (numbers, parts))
    log_sum_N = most_N + jnp.log(sum_N)
    nll_N = log_sum_N - target_N
    sums = LossSums(
        loss=jnp.sum(weights_N * nll_N),
        nll=jnp.sum(jnp.where(token_N, nll_N, 0)),
        tokens=jnp.sum(token_N),
        correct=jnp.sum(answer_N & (target_N >= most_N)),
        answers=jnp.sum(answer_N),
    )
    return sums, log_sum_N


def _gradient(
    fetch_piece: FetchPiece, saved: tuple[jax.Array, jax.Array, Columns, jax.Array], by_sums: LossSums
) -> tuple[jax.Array, jax.Array, None]:
    """Of `loss` (no other sum is differentiated) to hidden states and this chip's part of the table."""
    hidden_ND, part_VD, columns, log_sum_N = saved
    targets_N, weights_N = columns[0], columns[3] * by_sums.loss
    numbers, parts = _pieces(part_VD, len(targets_N))
    pieces = len(numbers)

    def piece(d_hidden_ND: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, part_RD = inputs
        table_RD, send_back = jax.vjp(fetch_piece, part_RD)
        logits_NR = _logits(hidden_ND, table_RD, number, pieces, len(part_VD))
        is_target_NR = jnp.arange(logits_NR.shape[1]) * pieces + number == targets_N[:, None]
        d_logits_NR = (jnp.exp(logits_NR - log_sum_N[:, None]) - is_target_NR) * weights_N[:, None]
        d_logits_NR = d_logits_NR.astype(hidden_ND.dtype)
        table_RD = table_RD.astype(hidden_ND.dtype)
        d_hidden_ND += jnp.einsum("nr,rd->nd", d_logits_NR, table_RD, preferred_element_type=jnp.float32)
        d_table_RD = jnp.einsum("nr,nd->rd", d_logits_NR, hidden_ND, preferred_element_type=jnp.float32)
        return d_hidden_ND, send_back(d_table_RD)[0]

    d_hidden_ND, d_parts = jax.lax.scan(piece, jnp.zeros(hidden_ND.shape), (numbers, parts))
    d_part_VD = d_parts.swapaxes(0, 1).reshape(-1, part_VD.shape[1])[: len(part_VD)]
    return d_hidden_ND.astype(hidden_ND.dtype), d_part_VD, None


def _pieces(part_VD: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Numbers 0, 1, .. and rows [pieces,R,D]: row r of piece i is row r · pieces + i of the table, or padding.

    (So a table whose rows lie along the mesh axis tensor is spread evenly in every piece.)
    """
    V, D = part_VD.shape
    pieces = -(-V * tokens // _MOST_LOGITS)
    rows_VD = jnp.pad(part_VD, ((0, -V % pieces), (0, 0)))
    return jnp.arange(pieces), rows_VD.reshape(-1, pieces, D).swapaxes(0, 1)


def _logits(hidden_ND: jax.Array, table_RD: jax.Array, number: jax.Array, pieces: int, vocab_size: int) -> jax.Array:
    """Logits [N,R] of a piece, float32; padding has -inf."""
    table_RD = table_RD.astype(hidden_ND.dtype)
    logits_NR = jnp.einsum("nd,rd->nr", hidden_ND, table_RD, preferred_element_type=jnp.float32)
    if vocab_size % pieces == 0:
        return logits_NR
    return jnp.where(jnp.arange(len(table_RD)) * pieces + number < vocab_size, logits_NR, -jnp.inf)


def _forward(
    fetch_piece: FetchPiece, hidden_ND: jax.Array, part_VD: jax.Array, columns: Columns
) -> tuple[LossSums, tuple[jax.Array, jax.Array, Columns, jax.Array]]:
    sums, log_sum_N = _sums(fetch_piece, hidden_ND, part_VD, columns)
    return sums, (hidden_ND, part_VD, columns, log_sum_N)


_token_loss.defvjp(_forward, _gradient)


def zero_sums() -> LossSums:
    """Sums over nothing."""
    count = jnp.zeros((), jnp.int32)
    return LossSums(loss=jnp.zeros(()), nll=jnp.zeros(()), tokens=count, correct=count, answers=count)
