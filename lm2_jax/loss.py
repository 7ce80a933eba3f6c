"""What training minimises: cross-entropy over a window, divided by the global number of tokens that count.

Axes: B lanes, S segments, T tokens, N tokens of all of these, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm2_jax.model.decoder import Decoder
from lm2_jax.model.placement import on_own_lanes

Batch = Mapping[str, jax.Array]  # the arrays of data/lanes.py: tokens, targets, document, answers [B,S,T]; reset [B,S]

_MOST_LOGITS = 2**26  # held at once: 256 MiB


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
    """Projects hidden states to the vocabulary, a piece at a time, and adds up the loss.

    The gradient is made in the same pass: no logits are kept, and none are computed twice.
    """
    name = "embedding" if model.config.model.tie_embeddings else "head"
    columns = (batch["targets_BST"], batch["document_BST"] > 0, batch["answers_BST"], weights_BST)

    def run(weights: Any, arrays: Any) -> tuple[LossSums, Any]:
        hidden_BSTD, columns = arrays
        hidden_ND = hidden_BSTD.reshape(-1, hidden_BSTD.shape[-1])
        sums = _token_loss(hidden_ND, weights[name], jax.tree.map(lambda a: a.reshape(-1), columns))
        return jax.tree.map(lambda a: a[None], sums), {}

    weights, axes = {name: params[name]}, {name: PartitionSpec("vocab", "embed")}
    sums, _ = on_own_lanes(run, weights, axes, model.config.train.dtype, (hidden_BSTD, columns))
    return jax.tree.map(jnp.sum, sums)


@jax.custom_vjp
def _token_loss(hidden_ND: jax.Array, table_VD: jax.Array, columns: tuple[jax.Array, ...]) -> LossSums:
    """Sums over N tokens. columns, each [N]: targets, which are tokens, which are answers, weights in the objective."""
    return _pass(hidden_ND, table_VD, columns, with_gradient=False)[0]


def _pass(
    hidden_ND: jax.Array, table_VD: jax.Array, columns: tuple[jax.Array, ...], with_gradient: bool
) -> tuple[LossSums, Any]:
    """The sums and, if wanted, the gradient of `loss` to hidden states and table."""
    table = table_VD.astype(hidden_ND.dtype)

    def piece(
        totals: tuple[LossSums, Any], inputs: tuple[jax.Array, tuple[jax.Array, ...]]
    ) -> tuple[tuple[LossSums, Any], Any]:
        (sums, d_table_VD), (hidden_ND, (targets_N, token_N, answer_N, weights_N)) = totals, inputs
        logits_NV = jnp.einsum("nd,vd->nv", hidden_ND, table, preferred_element_type=jnp.float32)
        log_sum_N = jax.nn.logsumexp(logits_NV, axis=-1)
        target_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        nll_N = log_sum_N - target_N
        here = LossSums(
            loss=jnp.sum(weights_N * nll_N),
            nll=jnp.sum(jnp.where(token_N, nll_N, 0)),
            tokens=jnp.sum(token_N),
            correct=jnp.sum(answer_N & (target_N >= jnp.max(logits_NV, axis=-1))),
            answers=jnp.sum(answer_N),
        )
        sums = jax.tree.map(jnp.add, sums, here)
        if not with_gradient:
            return (sums, d_table_VD), None
        is_target_NV = jnp.arange(logits_NV.shape[1]) == targets_N[:, None]
        d_logits_NV = (jnp.exp(logits_NV - log_sum_N[:, None]) - is_target_NV) * weights_N[:, None]
        d_logits_NV = d_logits_NV.astype(hidden_ND.dtype)
        d_table_VD += jnp.einsum("nv,nd->vd", d_logits_NV, hidden_ND, preferred_element_type=jnp.float32)
        return (sums, d_table_VD), d_logits_NV @ table

    pieces = _number_of_pieces(*hidden_ND.shape[:1], table_VD.shape[0])
    inputs = jax.tree.map(lambda a: a.reshape(pieces, -1, *a.shape[1:]), (hidden_ND, columns))
    start = zero_sums(), jnp.zeros(table_VD.shape) if with_gradient else ()
    (sums, d_table_VD), d_hidden = jax.lax.scan(piece, start, inputs)
    return sums, (d_hidden.reshape(hidden_ND.shape), d_table_VD) if with_gradient else None


def _number_of_pieces(tokens: int, vocabulary: int) -> int:
    """The fewest equal pieces whose logits stay below a limit."""
    return next(
        n for n in range(1, tokens + 1) if (tokens % n == 0 and tokens // n * vocabulary <= _MOST_LOGITS) or n == tokens
    )


def _token_loss_forward(hidden_ND: jax.Array, table_VD: jax.Array, columns: Any) -> tuple[LossSums, Any]:
    return _pass(hidden_ND, table_VD, columns, with_gradient=True)


def _token_loss_backward(gradient: tuple[jax.Array, jax.Array], by_sums: LossSums) -> tuple[Any, Any, None]:
    scaled = jax.tree.map(lambda g: (g * by_sums.loss).astype(g.dtype), gradient)
    return *scaled, None  # of the sums, only `loss` is differentiated


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def zero_sums() -> LossSums:
    """Sums over nothing."""
    count = jnp.zeros((), jnp.int32)
    return LossSums(loss=jnp.zeros(()), nll=jnp.zeros(()), tokens=count, correct=count, answers=count)
