"""Log-likelihoods of continuations, given their contexts; both may be of any length.

A text streams through a fresh memory, a segment at a time. Requests with the same text (a question's choices of one
token each, which need only the context) share one pass; texts of similar lengths run together.

Axes: B rows, T tokens in a segment, P positions of a text, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.evals.model import EvalModel, Step
from lm2_jax.model.decoder import Decoder
from lm2_jax.segments import run_batch

Request = tuple[Sequence[int], Sequence[int]]  # token ids of the context and of the continuation
_PROJECTED = 64  # positions whose logits are held together
_SHORTEST = 16  # shortest segment that is compiled; the others are twice, four times, ... as long, up to T


def loglikelihood(loaded: EvalModel, requests: Sequence[Request]) -> Iterator[list[tuple[int, float, bool]]]:
    """Computes log-likelihoods of continuations, data.batch_size texts at a time, the longest first.

    Args:
      requests: contexts and continuations of at least one token each; a context includes the document's begin token.

    Yields:
      batch by batch, (index of the request, natural logarithm of the continuation's probability, whether greedy
      decoding would generate it). Neither depends on the batch.
    Raises UserError if the memory kind's tokens look ahead.
    """
    if not loaded.model.kind.is_causal:
        raise UserError(
            f"memory.kind {loaded.config.memory.kind}: its tokens look ahead to the end of their segment, so it "
            "gives no probability of a continuation"
        )
    requests_of: dict[bytes, list[int]] = {}  # indices of the requests, by the ids that the model reads for them
    for index, (context, continuation) in enumerate(requests):
        read_P = np.array([*context, *continuation[:-1]], np.int32)
        requests_of.setdefault(read_P.tobytes(), []).append(index)
    longest_first = sorted(requests_of, key=len, reverse=True)
    rows = loaded.config.data.batch_size
    step, memory = _make_step(loaded), loaded.fresh_memory()
    for start in range(0, len(longest_first), rows):
        batch = longest_first[start : start + rows]
        read = _read(loaded, step, memory, [np.frombuffer(key, np.int32) for key in batch])
        scored = []
        for key, (log_P, greedy_P, last_V) in zip(batch, read, strict=True):
            for index in requests_of[key]:
                context, continuation = requests[index]
                inner, last = slice(len(context) - 1, None), continuation[-1]
                log = log_P[inner].sum(dtype=np.float64) + last_V[last]
                scored.append((index, float(log), bool(greedy_P[inner].all() and last_V.argmax() == last)))
        yield scored


def _read(loaded: EvalModel, step: Step, memory: Any, texts: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """Reads texts, int32 [P] each, the longest first; `memory` is that of fresh rows.

    Returns, for each text, the log-probabilities of all its tokens but the first [P-1], whether they are the argmax
    [P-1], and the log-probabilities of the token after it [V].
    """
    rows, T = loaded.config.data.batch_size, loaded.config.trained_segment_length
    logs, greedy = ([[] for _ in texts] for _ in range(2))
    last = [np.empty(0)] * len(texts)
    for start in range(0, len(texts[0]), T):
        rest = len(texts[0]) - start
        width = min(T, max(_SHORTEST, 1 << (rest - 1).bit_length()))
        tokens_BT, next_BT = np.zeros((2, rows, width), np.int32)
        count_B = np.zeros(rows, np.int32)
        for row, text_P in enumerate(texts):
            here, following = text_P[start : start + width], text_P[start + 1 : start + width + 1]
            tokens_BT[row, : len(here)], next_BT[row, : len(following)] = here, following
            count_B[row] = len(here)
        results, memory = step(memory, (tokens_BT, next_BT, count_B))
        log_BT, greedy_BT, last_BV = map(np.asarray, results)
        for row, text_P in enumerate(texts):
            known = max(len(text_P) - 1 - start, 0)
            logs[row].append(log_BT[row, :known])
            greedy[row].append(greedy_BT[row, :known])
            if start < len(text_P) <= start + width:
                last[row] = last_BV[row]
    return [(np.concatenate(a), np.concatenate(b), c) for a, b, c in zip(logs, greedy, last, strict=True)]


def _make_step(loaded: EvalModel) -> Step:
    """A jitted step over one segment.

    (memory, (tokens [B,T], next tokens [B,T], tokens that are not padding [B])) -> ((log-probabilities of the next
    tokens [B,T], whether they are the argmax [B,T], log-probabilities after each row's last token [B,V]), memory)
    """
    model = loaded.model

    def step(params: Any, memory: Any, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[tuple, Any]:
        tokens_BT, next_BT, count_B = inputs
        document_BT = (jnp.arange(tokens_BT.shape[1]) < count_B[:, None]).astype(jnp.int32)
        reset_B1 = jnp.zeros((len(count_B), 1), bool)
        batch = Batch(tokens_BT[:, None], document_BT[:, None], reset_B1)
        hidden_B1TD, memory, _ = run_batch(model, params, batch, memory)

        def log_probabilities(hidden_BD: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(model.apply({"params": params}, hidden_BD, method=Decoder.project), axis=-1)

        def position(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_BD, next_B = inputs
            log_BV = log_probabilities(hidden_BD)
            log_B = jnp.take_along_axis(log_BV, next_B[:, None], axis=-1)[:, 0]
            return log_B, jnp.argmax(log_BV, axis=-1) == next_B

        hidden_TBD = jnp.moveaxis(hidden_B1TD[:, 0], 1, 0)
        log_TB, greedy_TB = jax.lax.map(position, (hidden_TBD, next_BT.T), batch_size=_PROJECTED)
        last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
        last_BV = log_probabilities(jnp.take_along_axis(hidden_B1TD[:, 0], last_B11, axis=1)[:, 0])
        return (log_TB.T, greedy_TB.T, last_BV), memory

    return loaded.jit(step)
