"""Sources of bAbI stories: documents to train on, and documents with one question each to measure answers by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import expand_paths
from lm2_jax.config import DataConfig, StoriesConfig
from lm2_jax.data.babi.files import Story, is_held_out, question_samples, read_babi
from lm2_jax.data.babi.needle import needle_story
from lm2_jax.data.babi.scatter import Scatterer
from lm2_jax.data.babi.world import Task, generate_story
from lm2_jax.data.documents import Document, DocumentSource
from lm2_jax.tokenizer import Tokenizer

StoryTask = Task | Literal["niah"]
_MAX_ATTEMPTS = 5000  # stories made up for one document before the budget is called too small


@dataclasses.dataclass(frozen=True)
class StoryFiles:
    """bAbI files to take stories from.

    Attributes:
      paths: files or patterns.
      key: the setting that names them, for messages.
      side: which of the stories: all, those that `is_held_out` holds out, or the others, for training.
    """

    paths: tuple[str, ...]
    key: str
    side: Literal["all", "held out", "training"] = "all"

    def read(self) -> list[Story]:
        """Reads the stories. Raises UserError if a file cannot be used, or no story is on the wanted side."""
        stories = [story for path in expand_paths(self.paths, self.key) for story in read_babi(path)]
        if self.side == "all":
            return stories
        side = [story for story in stories if is_held_out(story) == (self.side == "held out")]
        if not side:
            what = "held out" if self.side == "held out" else "left to train on"
            raise UserError(
                f"{self.key}: none of {len(stories)} stories is {what}; use more, or name data.validation_path"
            )
        return side


@dataclasses.dataclass(eq=False, repr=False)
class _Documents(DocumentSource):
    """Random-access documents, each a function of (seed, index), with given stories or made-up ones."""

    scatterer: Scatterer
    config: StoriesConfig
    seed: int
    held_out: bool
    count: int
    stories: Sequence[Story] | None

    def __post_init__(self) -> None:
        for task in self.config.tasks if self.stories is None else ():
            self._make_up(task, np.random.default_rng(self.seed))  # raises UserError if none fits

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < self.count:
            raise IndexError(f"document {index} of {self.count}")
        rng = np.random.default_rng((self.seed, index))
        if self.stories is None:
            tasks = self.config.tasks
            story = self._make_up(tasks[int(rng.random() * len(tasks))], rng)
        else:
            story = self.stories[index]
        return self.scatterer.scatter(story, rng)

    def __repr__(self) -> str:
        origin = ",".join(self.config.tasks) if self.stories is None else "files"
        return (
            f"{type(self).__name__}({origin}, budget={self.scatterer.budget}, seed={self.seed}, "
            f"held_out={self.held_out}, documents={self.count})"
        )

    def _make_up(self, task: StoryTask, rng: np.random.Generator) -> Story:
        """Makes up a story on the wanted side of the split; one that is too long is made again with fewer lines."""
        config, room = self.config, self.scatterer.room
        ranges = (config.facts, config.questions_between, config.questions_after)
        for _ in range(_MAX_ATTEMPTS):
            draws = rng.random(3).tolist()
            facts, between, after = (
                low + int(draw * (high + 1 - low)) for (low, high), draw in zip(ranges, draws, strict=True)
            )
            story = _story(config, task, rng, facts, between, after)
            while (length := self.scatterer.length(story)) > room and (facts, between, after) != (1, 0, 1):
                facts, between, after = (
                    max(least, count * room // length) for least, count in ((1, facts), (0, between), (1, after))
                )
                story = _story(config, task, rng, facts, between, after)
            if length <= room and is_held_out(story) == self.held_out:
                return story
        raise UserError(
            f"data.segment_length: {self.scatterer.budget} tokens are too few for a story of {task} with one "
            "question; use longer or more segments (data.segments_per_window, train.curriculum, eval.lengths), or "
            "leave the task out of data.stories.tasks"
        )


class StorySource(_Documents):
    """Documents to train or validate on: questions inside the story and after it.

    Without `data.path` stories are made up as `data.stories` says, a new one for every index. With it they come from
    bAbI files, one document per story, cut after the last question that fits; stories whose first question does not fit
    are left out. One story in eight, by a hash of its statements, is held out; where `data.validation_path` names
    files, all of their stories are held out instead, and none of `data.path`.

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
        scatterer = _scatterer(data, tokenizer, budget, segment_length, data.stories.gap)
        stories = None
        if held_out and data.validation_path:
            stories = _fitting(StoryFiles(data.validation_path, "data.validation_path"), scatterer)
        elif data.path:
            side = "all" if data.validation_path else "held out" if held_out else "training"
            stories = _fitting(StoryFiles(data.path, "data.path", side), scatterer)
        count = data.stories.per_epoch if stories is None else len(stories)
        super().__init__(scatterer, data.stories, seed=seed, held_out=held_out, count=count, stories=stories)


class QuestionSource(_Documents):
    """Documents to measure answers by: one question each, at the very end, in a context of exactly `budget` tokens.

    With a budget of None there is no background: the context is the story.

    Made-up stories are held-out ones. The same index holds the same story for every budget that it fits, so accuracies
    over lengths are paired. From bAbI files every question is a sample, as in BABILong, in a fixed shuffled order;
    those that do not fit the budget are left out.

    The arguments are those of StorySource, but `data.path` is not used, and

      budget: None: as many input positions as the story has.
      count: documents; fewer if the files hold fewer questions.
      files: bAbI files; None: made-up stories.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        budget: int | None,
        seed: int,
        count: int,
        files: StoryFiles | None = None,
        segment_length: int | None = None,
    ) -> None:
        scatterer = _scatterer(data, tokenizer, budget, segment_length)
        samples = None
        if files:
            every = [sample for story in files.read() for sample in question_samples(story)]
            shuffled = (every[i] for i in np.random.default_rng(seed).permutation(len(every)))
            samples = list(islice((sample for sample in shuffled if scatterer.length(sample) <= scatterer.room), count))
            if not samples:
                raise _too_small(files.key, every, scatterer)
            count = len(samples)
        one_question = data.stories.model_copy(update={"questions_between": (0, 0), "questions_after": (1, 1)})
        super().__init__(scatterer, one_question, seed=seed, held_out=True, count=count, stories=samples)


def _scatterer(
    data: DataConfig, tokenizer: Tokenizer, budget: int | None, segment_length: int | None, gap: int = 0
) -> Scatterer:
    stories = data.stories
    whole, repeats = segment_length if stories.whole_lines else None, set(stories.tasks) == {"niah"}
    return Scatterer(tokenizer, budget, data.background, whole, gap, repeats)


def _story(
    config: StoriesConfig, task: StoryTask, rng: np.random.Generator, facts: int, between: int, after: int
) -> Story:
    if task == "niah":
        return needle_story(rng)
    asked_between = [other for other in config.tasks if other != "niah"]
    return generate_story(task, rng, facts, between, after, asked_between)


def _fitting(files: StoryFiles, scatterer: Scatterer) -> list[Story]:
    stories = files.read()
    prefixes = [prefix for story in stories if (prefix := scatterer.longest_prefix(story))]
    if not prefixes:
        raise _too_small(files.key, (sample for story in stories for sample in question_samples(story)), scatterer)
    return prefixes


def _too_small(key: str, samples: Iterable[Story], scatterer: Scatterer) -> UserError:
    shortest = min(map(scatterer.length, samples), default=None)
    if shortest is None:
        return UserError(f"{key}: the files hold no question; use bAbI files, which mix statements and questions")
    needed = shortest + scatterer.budget - scatterer.room
    return UserError(
        f"{key}: the shortest story with a question needs {needed} tokens, a document has {scatterer.budget}; "
        "use more or longer segments"
    )
