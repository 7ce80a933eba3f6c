"""What training minimises: cross-entropy over a window, divided by the global number of tokens that count.

Axes: B lanes, S segments, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from lm2_jax.model.decoder import Decoder

Batch = Mapping[str, jax.Array]  # the arrays of data/lanes.py: tokens, targets, document, answers [B,S,T]; reset [B,S]


@chex.dataclass(frozen=True)
class LossSums:
    """Sums over a batch; they add up over microbatches and validation windows.

    Attributes:
      loss: the objective (with weights that already hold the division by the global counts).
      nll: negative log-likelihood in nats over all tokens.
      tokens: tokens that were predicted.
      correct: answer tokens whose most likely prediction is right.
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
    """Projects to the vocabulary one segment at a time, so that logits of one segment are held at once."""

    @jax.checkpoint
    def segment(sums: LossSums, inputs: tuple[jax.Array, ...]) -> tuple[LossSums, None]:
        hidden_BTD, targets_BT, document_BT, answers_BT, weights_BT = inputs
        logits_BTV = model.apply({"params": params}, hidden_BTD, method="project")
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        token_BT = document_BT > 0
        correct_BT = answers_BT & (jnp.argmax(logits_BTV, axis=-1) == targets_BT)
        here = LossSums(
            loss=jnp.sum(weights_BT * nll_BT),
            nll=jnp.sum(jnp.where(token_BT, nll_BT, 0)),
            tokens=jnp.sum(token_BT),
            correct=jnp.sum(correct_BT),
            answers=jnp.sum(answers_BT),
        )
        return jax.tree.map(jnp.add, sums, here), None

    columns = (hidden_BSTD, batch["targets_BST"], batch["document_BST"], batch["answers_BST"], weights_BST)
    sums, _ = jax.lax.scan(segment, zero_sums(), jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), columns))
    return sums


def zero_sums() -> LossSums:
    """Sums over nothing."""
    count = jnp.zeros((), jnp.int32)
    return LossSums(loss=jnp.zeros(()), nll=jnp.zeros(()), tokens=count, correct=count, answers=count)
