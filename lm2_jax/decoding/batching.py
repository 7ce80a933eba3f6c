"""Continuous batching: many prompts go through the rows of one state, and a row that is done takes the next prompt.

Every row reads at its own pace: a prompt by windows, what it draws by single tokens. So a few compiled programs serve
any number of prompts of any lengths, and a row's tokens do not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm2_jax.decoding import sampling
from lm2_jax.decoding.placement import prepare
from lm2_jax.model.decoder import Decoder


@dataclasses.dataclass
class _Row:
    """A prompt that a row works on.

    Attributes:
      number: of the prompt.
      unread: tokens to read: the rest of the prompt, then the last drawn one.
      written: tokens drawn so far.
    """

    number: int
    unread: np.ndarray
    written: list[int]


def decode_all(
    model: Decoder, params: Any, prompts: Sequence[Sequence[int]], rows: int, *, seed: int = 0, **options: Any
) -> Iterator[tuple[int, list[int]]]:
    """Continues every prompt; yields (number of the prompt, its new tokens) as prompts are done.

    Args:
      rows: prompts that are worked on at a time.
      seed: prompt i draws from seed + i.
      options: fields of `sampling.DecodeOptions`.

    Raises UserError for an option that makes no sense, an empty prompt, or an id that is not in the vocabulary.
    """
    wanted, params = sampling.DecodeOptions(**options), prepare(model, params)
    texts = sampling.check_prompts(prompts, model.spec.model.vocab_size)
    if wanted.max_new_tokens == 0:
        yield from ((number, []) for number in range(len(texts)))
        return
    waiting = iter([_Row(number, text, []) for number, text in enumerate(texts)])
    working: list[_Row | None] = [None] * rows
    state = sampling.start(model, params, rows)
    while True:
        new_B = np.zeros(rows, bool)
        for row in range(rows):
            if working[row] is None:
                working[row] = next(waiting, None)
                new_B[row] = working[row] is not None
        if not any(working):
            return
        if new_B.any():
            state = sampling.restart_rows(model, params, new_B, state)
        tokens_BQ, count_B = _take(working, np.asarray(state.count_B), state.segment_length)
        logits_BV, state = sampling.advance(model, params, tokens_BQ, count_B, state)
        seed_B = np.array([(seed + row.number) % 2**32 if row else 0 for row in working], np.uint32)
        token_B = sampling.next_tokens(logits_BV, seed_B, state.read_B, wanted)
        for index, row in enumerate(working):
            if row is None or len(row.unread):
                continue
            token = int(token_B[index])
            is_over = token in wanted.stop_ids
            if not is_over:
                row.written.append(token)
                row.unread = np.array([token])
            if is_over or len(row.written) == wanted.max_new_tokens:
                yield row.number, row.written
                working[index] = None


def _take(working: Sequence[_Row | None], before_B: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that rows read next [B,Q], and how many; Q is 1 if no row has more, else the window."""
    longest = max(len(row.unread) for row in working if row)
    Q = 1 if longest == 1 else min(T, sampling.WINDOW)
    tokens_BQ, count_B = np.zeros((len(working), Q), np.int32), np.zeros(len(working), np.int32)
    for index, row in enumerate(working):
        if row is not None:
            chunk = row.unread[: min(Q, T - before_B[index] % T)]  # a full segment makes room for T
            tokens_BQ[index, : len(chunk)], count_B[index] = chunk, len(chunk)
            row.unread = row.unread[len(chunk) :]
    return tokens_BQ, count_B
