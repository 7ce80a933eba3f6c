"""Continuous batching: many prompts go through the rows of one state, and a row that is done takes the next prompt.

Every row reads at its own pace: a prompt by windows, what it draws by single tokens. So a few compiled programs serve
any number of prompts of any lengths, and a row's tokens do not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.decoding import sampling
from lm2_jax.decoding.placement import prepare
from lm2_jax.model.decoder import Decoder

_NOTHING = np.zeros(0, np.int32)


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
    if rows < 1:
        raise UserError(f"rows: found {rows}; give 1 or more")
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
        unread = [row.unread if row else _NOTHING for row in working]
        Q = 1 if max(map(len, unread)) == 1 else min(state.segment_length, sampling.WINDOW)
        tokens_BQ, count_B = sampling.next_window(unread, state, Q)
        logits_BV, state = sampling.advance(model, params, tokens_BQ, count_B, state)
        seed_B = np.array([(seed + row.number) % 2**32 if row else 0 for row in working], np.uint32)
        token_B = sampling.next_tokens(logits_BV, seed_B, state.read_B, wanted)
        for index, row in enumerate(working):
            if row is None:
                continue
            row.unread = row.unread[count_B[index] :]
            if len(row.unread):
                continue
            token = int(token_B[index])
            is_over = token in wanted.stop_ids
            if not is_over:
                row.written.append(token)
                row.unread = np.array([token])
            if is_over or len(row.written) == wanted.max_new_tokens:
                yield row.number, row.written
                working[index] = None
