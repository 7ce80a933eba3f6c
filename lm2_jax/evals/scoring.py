"""How likely continuations are, given what stands before them; both may be of any length.

What is read streams through a fresh memory, a segment at a time. Requests that read the same (the choices of one
question, where each is one token) share one reading; readings of like lengths run together.

Axes: B rows, T tokens in a segment, P positions of a reading, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.evals.model import EvalModel
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import batch_sharding, memory_shardings, replicated
from lm2_jax.segments import run_batch

Request = tuple[Sequence[int], Sequence[int]]  # token ids of the context and of the continuation
Step = Callable[..., tuple[jax.Array, jax.Array, jax.Array, Any]]
_PROJECTED = 64  # positions whose logits are held at once
_SHORTEST = 16  # segment that is compiled for; the others are twice, four times, ... as long, up to T


def score(loaded: EvalModel, requests: Sequence[Request]) -> Iterator[list[tuple[int, float, bool]]]:
    """Scores continuations, data.batch_size readings at a time, the longest first.

    Args:
      requests: contexts and continuations of at least one token each; a context begins as a document does.

    Yields:
      batch by batch, (index of the request, natural logarithm of the continuation's probability, whether it is what
      greedy decoding would write). Neither depends on the batch.
    Raises UserError if the memory kind looks ahead.
    """
    if not loaded.model.kind.is_causal:
        raise UserError(
            f"memory.kind {loaded.config.memory.kind}: its tokens look ahead to the end of their segment, so it gives "
            "no probability of what follows"
        )
    readings: dict[bytes, list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        read_P = np.array([*context, *continuation[:-1]], np.int32)
        readings.setdefault(read_P.tobytes(), []).append(index)
    longest_first = sorted(readings, key=len, reverse=True)
    rows = loaded.config.data.batch_size
    step, memory = _make_step(loaded)
    for start in range(0, len(longest_first), rows):
        batch = longest_first[start : start + rows]
        read = _read(loaded, step, memory, [np.frombuffer(key, np.int32) for key in batch])
        scored = []
        for key, (log_P, greedy_P, last_V) in zip(batch, read, strict=True):
            for index in readings[key]:
                context, continuation = requests[index]
                inner, last = slice(len(context) - 1, None), continuation[-1]
                log = log_P[inner].sum(dtype=np.float64) + last_V[last]
                scored.append((index, float(log), bool(greedy_P[inner].all() and last_V.argmax() == last)))
        yield scored


def _read(loaded: EvalModel, step: Step, memory: Any, texts: list[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """Reads texts, int32 [P] each, the longest first, from the memory of fresh rows.

    Returns, for each text, the log-probabilities of its tokens but the first [P-1], whether they are the likeliest
    [P-1], and the log-probabilities of all that may come next [V].
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
        *found, memory = step(loaded.params, memory, tokens_BT, next_BT, count_B)
        log_BT, greedy_BT, last_BV = map(np.asarray, found)
        for row, text_P in enumerate(texts):
            known = max(len(text_P) - 1 - start, 0)
            logs[row].append(log_BT[row, :known])
            greedy[row].append(greedy_BT[row, :known])
            if start < len(text_P) <= start + width:
                last[row] = last_BV[row]
    return [(np.concatenate(a), np.concatenate(b), c) for a, b, c in zip(logs, greedy, last, strict=True)]


def _make_step(loaded: EvalModel) -> tuple[Step, Any]:
    """A jitted step over one segment, and the memory to begin with.

    (params, memory, tokens, next tokens [B,T], tokens that are no padding [B]) -> (log-probabilities of the next tokens
    [B,T], whether they are the likeliest [B,T], log-probabilities after each row's last token [B,V], memory)
    """
    model, mesh = loaded.model, loaded.mesh

    def fresh(params: Any) -> Any:
        return model.init_memory(loaded.config.data.batch_size, params)

    def step(params: Any, memory: Any, tokens_BT: jax.Array, next_BT: jax.Array, count_B: jax.Array) -> tuple:
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
        return log_TB.T, greedy_TB.T, last_BV, memory

    shardings = memory_shardings(mesh, jax.eval_shape(fresh, loaded.params), model.kind.lane_axis)
    params_shardings, lanes = jax.tree.map(lambda leaf: leaf.sharding, loaded.params), batch_sharding(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(params_shardings, shardings, lanes, lanes, lanes),
        out_shardings=(replicated(mesh), replicated(mesh), replicated(mesh), shardings),
    )
    return jitted, jax.jit(fresh, out_shardings=shardings)(loaded.params)
