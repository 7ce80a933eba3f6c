"""Stories as documents: statements and questions scattered among background sentences, for training and evaluation.

A document is `[<bos>] text [<eos>]`; in the text a question stands with its answer: "Where is John? hallway.".
"""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.config import DataConfig, StoriesConfig
from lm2_jax.data.babi.background import BookBackground, builtin_sentences
from lm2_jax.data.babi.files import Line, Question, Statement, Story, question_samples, read_babi
from lm2_jax.data.babi.world import Task, generate_story
from lm2_jax.data.documents import Document
from lm2_jax.data.paths import expand_paths
from lm2_jax.tokenizer import Tokenizer

_HELD_OUT_SHARE = 8  # one story in so many is held out
_MAX_ATTEMPTS = 5000  # stories made up for one document before the budget is called too small


class _Piece(NamedTuple):
    """Ids of a sentence; those of its answer are `ids[start:stop]`."""

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
      background: text files or patterns whose sentences stand between the story's; None: built-in ones.
      segment_length: lines of the story are not cut by the end of a segment of so many tokens, as long as there is
        background to move before them; None: segments end anywhere.

    Attributes:
      budget: as given.
      room: tokens of a document that begin and end leave.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        budget: int | None,
        background: Sequence[str] | None = None,
        segment_length: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._segment_length = segment_length
        self._sentences = BookBackground(background).sentences if background else builtin_sentences
        self._begin = [_Piece([i]) for i in (tokenizer.bos_id,) if i is not None]
        self._end = [_Piece([i]) for i in (tokenizer.eos_id,) if i is not None]
        self._pieces: dict[tuple[Line, str], _Piece] = {}  # stories repeat their few different lines
        self.budget = budget
        self.room = sys.maxsize if budget is None else budget + 1 - len(self._begin) - len(self._end)

    def length(self, story: Story) -> int:
        """Tokens of a story without background, begin and end."""
        # The first line may need more ids without its leading space, and may or may not come first in the document.
        unspaced = len(self._encode(story[0], "").ids) - len(self._encode(story[0], " ").ids)
        return max(unspaced, 0) + sum(len(self._encode(line, " ").ids) for line in story)

    def longest_prefix(self, story: Story) -> Story:
        """As many of a story's first lines as fit and end in a question; () if none do."""
        ends = (i for i in range(len(story), 0, -1) if isinstance(story[i - 1], Question))
        return next((story[:end] for end in ends if self.length(story[:end]) <= self.room), ())

    def scatter(self, story: Story, rng: np.random.Generator) -> Document:
        """A document with the whole story, in order, and background up to the budget (as BABILong, arXiv 2406.10149).

        The lines up to the last statement go at sorted random positions between background sentences, drawn with
        replacement; the questions after it stand together at the end. The last background sentence is cut to fit.

        Raises ValueError if the story alone is above the budget.
        """
        missing = 0 if self.budget is None else self.room - self.length(story)
        if missing < 0:
            raise ValueError(f"a story is {-missing} tokens above the budget of {self.budget}")
        filler, opening = self._fill(missing, rng)
        lines = [self._encode(line, " ") for line in story]
        early = 1 + max((i for i, line in enumerate(story) if isinstance(line, Statement)), default=-1)
        positions = np.sort(rng.integers(0, len(filler) + 1, size=early)).tolist()
        if filler and (not early or positions[0] > 0):
            filler[0] = opening
        else:
            lines[0] = self._encode(story[0], "")
        order, done = self._begin.copy(), 0
        for position, line in zip(positions, lines, strict=False):
            order += filler[done:position]
            order.append(line)
            done = position
        order += filler[done:] + lines[early:] + self._end
        return _document(order if self._segment_length is None else _keep_lines_whole(order, self._segment_length))

    def _fill(self, missing: int, rng: np.random.Generator) -> tuple[list[_Piece], _Piece]:
        """Background of `missing` tokens, and its first sentence as it stands at a text's start (no longer)."""
        filler: list[_Piece] = []
        opening = _Piece([])
        sentences = self._sentences(rng)
        while missing > 0:
            sentence = next(sentences)
            ids = self._tokenizer.encode(" " + sentence)[:missing]
            if not filler:
                opening = _Piece(self._tokenizer.encode(sentence)[: len(ids)], background=True)
            filler.append(_Piece(ids, background=True))
            missing -= len(ids)
        return filler, opening

    def _encode(self, line: Line, space: str) -> _Piece:
        piece = self._pieces.get((line, space))
        if piece is None:
            piece = self._pieces[line, space] = self._encode_line(line, space)
        return piece

    def _encode_line(self, line: Line, space: str) -> _Piece:
        ids = self._tokenizer.encode(space + line.text)
        answer = [] if isinstance(line, Statement) else self._tokenizer.encode(" " + line.answer)
        if getattr(self._tokenizer, "unk_id", None) in (*ids, *answer):
            words = line.text if isinstance(line, Statement) else f"{line.text} {line.answer}"
            raise UserError(
                f"tokenizer.kind stories does not know every word of {words!r}; it has those of tasks qa1 to qa5: "
                "for other stories train a tokenizer (tools/train_tokenizer.py) or take bytes"
            )
        if not answer:
            return _Piece(ids)
        return _Piece(ids + answer + self._tokenizer.encode("."), len(ids), len(ids) + len(answer))


class _Documents:
    """Random-access documents, each a function of (seed, index): of given stories, or of made-up ones."""

    lengths: np.ndarray | None = None

    def __init__(
        self,
        scatterer: Scatterer,
        config: StoriesConfig,
        *,
        seed: int,
        held_out: bool,
        count: int,
        stories: Sequence[Story] | None,
    ) -> None:
        self._scatterer = scatterer
        self._config = config
        self._seed = seed
        self._held_out = held_out
        self._count = count
        self._stories = stories
        if stories is None:
            for task in config.tasks:
                self._make_up(task, np.random.default_rng(seed))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self._count:
            raise IndexError(f"document {index} of {self._count}")
        rng = np.random.default_rng((self._seed, index))
        if self._stories is None:
            tasks = self._config.tasks
            story = self._make_up(tasks[int(rng.random() * len(tasks))], rng)
        else:
            story = self._stories[index]
        return self._scatterer.scatter(story, rng)

    def __repr__(self) -> str:
        origin = ",".join(self._config.tasks) if self._stories is None else "files"
        return (
            f"{type(self).__name__}({origin}, budget={self._scatterer.budget}, seed={self._seed}, "
            f"held_out={self._held_out}, documents={self._count})"
        )

    def _make_up(self, task: Task, rng: np.random.Generator) -> Story:
        """A story on the wanted side of the split; one that is too long is made again with fewer lines."""
        config, room = self._config, self._scatterer.room
        ranges = (config.facts, config.questions_between, config.questions_after)
        for _ in range(_MAX_ATTEMPTS):
            draws = rng.random(3).tolist()
            facts, between, after = (
                low + int(draw * (high + 1 - low)) for (low, high), draw in zip(ranges, draws, strict=True)
            )
            story = generate_story(task, rng, facts, between, after, config.tasks)
            while (length := self._scatterer.length(story)) > room and (facts, between, after) != (1, 0, 1):
                facts, between, after = (
                    max(least, count * room // length) for least, count in ((1, facts), (0, between), (1, after))
                )
                story = generate_story(task, rng, facts, between, after, config.tasks)
            if length <= room and is_held_out(story) == self._held_out:
                return story
        raise UserError(
            f"data.segment_length: {self._scatterer.budget} tokens are too few for a story of {task} with one "
            "question; use longer or more segments (data.segments_per_window, train.curriculum, eval.lengths), or "
            "leave the task out of data.stories.tasks"
        )


class StorySource(_Documents):
    """Documents to train or validate on: questions inside the story and after it.

    Without `data.path` stories are made up as `data.stories` says, a new one for every index. With it they come from
    bAbI files, one document per story, cut after the last question that fits; stories whose first question does not fit
    are left out. One story in eight, by a hash of its statements, is held out; where `data.validation_path` names
    files, the held-out stories are theirs, and no story of `data.path` is.

    Args:
      data: the data section of the config.
      tokenizer: text to ids.
      budget: input positions of a document (segments * segment_length of the window).
      seed: with the index it determines the document.
      held_out: take the held-out stories instead of all others.
      segment_length: of the lanes; lines are kept whole in them if `data.stories.whole_lines`.

    Raises UserError if files cannot be used or the budget is too small for any story.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        budget: int,
        seed: int,
        held_out: bool,
        segment_length: int | None = None,
    ) -> None:
        scatterer = Scatterer(tokenizer, budget, data.background, segment_length if data.stories.whole_lines else None)
        own_files = held_out and data.validation_path
        paths, key = (data.validation_path, "data.validation_path") if own_files else (data.path, "data.path")
        stories = None
        if paths:
            stories = _read_stories(paths, key)
            if not data.validation_path:
                stories = _one_side(stories, key, held_out)
            stories = _fitting(stories, key, scatterer)
        count = data.stories.per_epoch if stories is None else len(stories)
        super().__init__(scatterer, data.stories, seed=seed, held_out=held_out, count=count, stories=stories)


class QuestionSource(_Documents):
    """Documents to measure answers by: one question each, at the very end, in a context of exactly `budget` tokens.

    A budget of None leaves the stories alone: no background, a context as long as the story.

    Made-up stories are held-out ones. The same index holds the same story for every budget that it fits, so accuracies
    over lengths are paired. From bAbI files every question is a sample, as in BABILong, in a fixed shuffled order;
    those that do not fit the budget are left out.

    Args:
      data: the data section of the config; `data.path` is not used.
      tokenizer: text to ids.
      budget: input positions of a document; None: as many as its story has.
      seed: with the index it determines the document.
      count: documents; fewer if the files hold fewer questions.
      paths: bAbI test files or patterns; None: made-up stories.
      key: the setting that names them, for messages.
      held_out: of the files, take the stories that `StorySource` holds out, not all.
      segment_length: as in StorySource.

    Raises UserError if files cannot be used or the budget is too small for any story.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        budget: int | None,
        seed: int,
        count: int,
        paths: Sequence[str] | None = None,
        key: str = "eval.path",
        held_out: bool = False,
        segment_length: int | None = None,
    ) -> None:
        scatterer = Scatterer(tokenizer, budget, data.background, segment_length if data.stories.whole_lines else None)
        samples = None
        if paths:
            stories = _read_stories(paths, key)
            if held_out:
                stories = _one_side(stories, key, held_out=True)
            every = [sample for story in stories for sample in question_samples(story)]
            shuffled = (every[i] for i in np.random.default_rng(seed).permutation(len(every)))
            samples = list(islice((sample for sample in shuffled if scatterer.length(sample) <= scatterer.room), count))
            if not samples:
                raise _too_small(key, every, scatterer)
            count = len(samples)
        one_question = data.stories.model_copy(update={"questions_between": (0, 0), "questions_after": (1, 1)})
        super().__init__(scatterer, one_question, seed=seed, held_out=True, count=count, stories=samples)


def _keep_lines_whole(order: Sequence[_Piece], segment_length: int) -> Iterator[_Piece]:
    """Moves background up before a line that would cross a segment's end; lines keep their order."""
    rest, offset = deque(order), 0
    while rest:
        piece = rest.popleft()
        until_end = segment_length - offset % segment_length
        if until_end < len(piece.ids) <= segment_length and not piece.background:
            spare = sum(len(later.ids) for later in rest if later.background)
            if spare >= until_end:
                moved = _take_background(rest, until_end)
                yield moved
                offset += len(moved.ids)
        yield piece
        offset += len(piece.ids)


def _take_background(pieces: deque[_Piece], count: int) -> _Piece:
    """Removes the first `count` ids of background from `pieces`."""
    taken: list[int] = []
    for index, piece in enumerate(pieces):
        if piece.background and len(taken) < count:
            here = count - len(taken)
            taken += piece.ids[:here]
            pieces[index] = piece._replace(ids=piece.ids[here:])
    return _Piece(taken, background=True)


def is_held_out(story: Story) -> bool:
    """Whether a story belongs to the held-out eighth: a stable hash of its statements, whatever is asked."""
    text = " ".join(line.text for line in story if isinstance(line, Statement))
    return zlib.crc32(text.encode()) % _HELD_OUT_SHARE == 0


def _read_stories(paths: Iterable[str], key: str) -> list[Story]:
    return [story for path in expand_paths(tuple(paths), key) for story in read_babi(path)]


def _one_side(stories: Sequence[Story], key: str, held_out: bool) -> list[Story]:
    side = [story for story in stories if is_held_out(story) == held_out]
    if not side:
        what = "held out" if held_out else "left to train on"
        raise UserError(f"{key}: of {len(stories)} stories none is {what}; use more, or name data.validation_path")
    return side


def _fitting(stories: Sequence[Story], key: str, scatterer: Scatterer) -> list[Story]:
    prefixes = [prefix for story in stories if (prefix := scatterer.longest_prefix(story))]
    if not prefixes:
        raise _too_small(key, (sample for story in stories for sample in question_samples(story)), scatterer)
    return prefixes


def _too_small(key: str, samples: Iterable[Story], scatterer: Scatterer) -> UserError:
    shortest = min(map(scatterer.length, samples), default=None)
    if shortest is None:
        return UserError(f"{key}: the files hold no question; use bAbI files, where questions stand among statements")
    needed = shortest + scatterer.budget - scatterer.room
    return UserError(
        f"{key}: the shortest story with a question needs {needed} tokens, a document has {scatterer.budget}; "
        "use more or longer segments"
    )


def _document(pieces: Iterable[_Piece]) -> Document:
    pieces = list(pieces)
    tokens = np.array(list(chain.from_iterable(piece.ids for piece in pieces)), np.int32)
    answers = np.zeros(len(tokens), bool)
    offset = 0
    for piece in pieces:
        if piece.stop:
            answers[offset + piece.start : offset + piece.stop] = True
        offset += len(piece.ids)
    return Document(tokens, answers)
