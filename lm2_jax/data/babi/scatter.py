"""Scattering: the lines of a story among background sentences, in a document of a fixed number of tokens.

A document is `[<bos>] text [<eos>]`; in the text a question is followed by its answer: "Where is John? hallway.".
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple, TypeVar

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.data.babi.background import BookBackground, builtin_sentences
from lm2_jax.data.babi.files import Line, Question, Statement, Story
from lm2_jax.data.babi.needle import repeated_passage
from lm2_jax.data.documents import Document
from lm2_jax.tokenizer import Tokenizer

Item = TypeVar("Item")


class Sentence(NamedTuple):
    """Ids of a sentence; its answer, if any, is `ids[start:stop]`."""

    ids: list[int]
    start: int = 0
    stop: int = 0
    background: bool = False


class Scatterer:
    """Lays stories into documents of one length.

    Args:
      tokenizer: text to ids; sentences after the first are encoded with a leading space, answers as " hallway".
      budget: input positions. A document has at most budget + 1 tokens, since its last token is never an input.
        None: stories stand alone, without background.
      background: text files or patterns with the background's sentences; None: built-in ones.
      segment_length: keeps lines of the story from straddling the end of a segment of so many tokens, as long as
        there is background to move before them; None: segments end anywhere.
      gap: tokens of background, or all there are, between the last statement and the questions after it; statements
        that segment_length moves may take some of them.
      repeats: without files, one passage again and again instead of sentences that vary.

    Attributes:
      budget: as given.
      room: tokens of a document besides its begin and end tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        budget: int | None,
        background: Sequence[str] | None = None,
        segment_length: int | None = None,
        gap: int = 0,
        repeats: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._segment_length = segment_length
        self._gap = gap
        own = repeated_passage if repeats else builtin_sentences
        self._sentences = BookBackground(background).sentences if background else own
        self._begin = [Sentence([id]) for id in tokenizer.special.prefix_ids]
        self._end = [Sentence([id]) for id in (tokenizer.special.eos_id,) if id is not None]
        self._encoded: dict[tuple[Line, str], Sentence] = {}  # stories repeat their few different lines
        self.budget = budget
        self.room = sys.maxsize if budget is None else budget + 1 - len(self._begin) - len(self._end)

    def length(self, story: Story) -> int:
        """Tokens of a story without background, begin and end."""
        # The first line may need more ids without its leading space, and may or may not come first in the document.
        unspaced = len(self._encode(story[0], "").ids) - len(self._encode(story[0], " ").ids)
        return max(unspaced, 0) + sum(len(self._encode(line, " ").ids) for line in story)

    def longest_prefix(self, story: Story) -> Story:
        """The longest prefix of a story that fits and ends in a question; () if there is none."""
        ends = (i for i in range(len(story), 0, -1) if isinstance(story[i - 1], Question))
        return next((story[:end] for end in ends if self.length(story[:end]) <= self.room), ())

    def scatter(self, story: Story, rng: np.random.Generator) -> Document:
        """A document with the whole story, in order, and background up to the budget (as BABILong, arXiv 2406.10149).

        The lines up to the last statement go to sorted random positions between background sentences, drawn with
        replacement; the questions after it come together at the end. The last background sentence is cut to fit.

        Raises ValueError if the story alone is above the budget.
        """
        if self.length(story) > self.room:
            raise ValueError(f"a story is {self.length(story) - self.room} tokens above the budget of {self.budget}")
        lines = [self._encode(line, " ") for line in story]
        spaced, unspaced = lines[0], self._encode(story[0], "")
        room = self.room - _length(lines[1:])
        missing = 0 if self.budget is None else room - min(len(spaced.ids), len(unspaced.ids))
        filler, opening = self._fill(missing, rng)
        early = 1 + max((i for i, line in enumerate(story) if isinstance(line, Statement)), default=-1)
        behind = accumulate((len(sentence.ids) for sentence in reversed(_cut(filler, missing))), initial=0)
        before = len(filler) - sum(tokens < self._gap for tokens in behind)
        positions = np.sort(rng.integers(0, max(before, 0) + 1, size=early)).tolist()
        if opening and (not early or positions[0] > 0):
            filler[0] = opening
        else:
            lines[0] = unspaced
        filler = _cut(filler, room - len(lines[0].ids))
        order = [*self._begin, *interleave(lines, filler, positions), *lines[early:], *self._end]
        return _document(order if self._segment_length is None else _keep_lines_whole(order, self._segment_length))

    def _fill(self, missing: int, rng: np.random.Generator) -> tuple[list[Sentence], Sentence | None]:
        """Background of at least `missing` tokens, and its first sentence, if any, encoded for a text's start."""
        filler: list[Sentence] = []
        opening = None
        sentences = self._sentences(rng)
        while missing > 0:
            sentence = next(sentences)
            ids = self._tokenizer.encode(" " + sentence)
            filler.append(Sentence(ids, background=True))
            if opening is None:
                opening = Sentence(self._tokenizer.encode(sentence), background=True)
                missing += max(0, len(ids) - len(opening.ids))
            missing -= len(ids)
        return filler, opening

    def _encode(self, line: Line, space: str) -> Sentence:
        if (line, space) not in self._encoded:
            self._encoded[line, space] = self._encode_line(line, space)
        return self._encoded[line, space]

    def _encode_line(self, line: Line, space: str) -> Sentence:
        ids = self._tokenizer.encode(space + line.text)
        answer = [] if isinstance(line, Statement) else self._tokenizer.encode(" " + line.answer)
        if getattr(self._tokenizer, "unk_id", None) in (*ids, *answer):
            words = line.text if isinstance(line, Statement) else f"{line.text} {line.answer}"
            raise UserError(
                f"tokenizer.kind stories does not know every word of {words!r}; it has those of tasks qa1 to qa5; "
                "for other stories train a tokenizer (lm2_jax.train_tokenizer) or use tokenizer.kind bytes"
            )
        if not answer:
            return Sentence(ids)
        return Sentence(ids + answer + self._tokenizer.encode("."), len(ids), len(ids) + len(answer))


def _length(sentences: Iterable[Sentence]) -> int:
    return sum(len(sentence.ids) for sentence in sentences)


def _cut(sentences: Sequence[Sentence], count: int) -> list[Sentence]:
    """The first `count` ids of them."""
    starts = accumulate((len(sentence.ids) for sentence in sentences), initial=0)
    return [
        sentence._replace(ids=sentence.ids[: count - start])
        for sentence, start in zip(sentences, starts, strict=False)
        if start < count
    ]


def interleave(lines: Sequence[Item], background: Sequence[Item], positions: Sequence[int]) -> list[Item]:
    """Puts a line at each of the sorted `positions` between items of background; lines without one are left out."""
    order, done = list[Item](), 0
    for position, line in zip(positions, lines, strict=False):
        order += [*background[done:position], line]
        done = position
    return [*order, *background[done:]]


def _keep_lines_whole(order: Sequence[Sentence], segment_length: int) -> Iterator[Sentence]:
    """Moves background before a line that would cross a segment's end; lines keep their order."""
    rest, offset = deque(order), 0
    while rest:
        sentence = rest.popleft()
        until_end = segment_length - offset % segment_length
        if until_end < len(sentence.ids) <= segment_length and not sentence.background:
            spare = sum(len(later.ids) for later in rest if later.background)
            if spare >= until_end:
                moved = _take_background(rest, until_end)
                yield moved
                offset += len(moved.ids)
        yield sentence
        offset += len(sentence.ids)


def _take_background(order: deque[Sentence], count: int) -> Sentence:
    """Removes the first `count` ids of background from `order`."""
    taken: list[int] = []
    for index, sentence in enumerate(order):
        if sentence.background and len(taken) < count:
            here = count - len(taken)
            taken += sentence.ids[:here]
            order[index] = sentence._replace(ids=sentence.ids[here:])
    return Sentence(taken, background=True)


def _document(order: Iterable[Sentence]) -> Document:
    sentences = list(order)
    tokens = np.array(list(chain.from_iterable(sentence.ids for sentence in sentences)), np.int32)
    answers = np.zeros(len(tokens), bool)
    offset = 0
    for sentence in sentences:
        answers[offset + sentence.start : offset + sentence.stop] = True
        offset += len(sentence.ids)
    return Document(tokens, answers)
