"""BABILong samples (arXiv 2406.10149): bAbI questions whose facts are scattered through books; built or read.

A sample has all statements before one question, and no other question. Its context is `length` tokens long, of which
300 are left for the prompt; facts stand in their order between consecutive sentences of a book.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.local_copies import local_copy
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.config import BabilongTask, StoriesConfig
from lm2_jax.data.babi.background import Books, builtin_sentences
from lm2_jax.data.babi.files import Story, is_held_out, question_samples, read_babi
from lm2_jax.data.babi.scatter import interleave
from lm2_jax.data.babi.world import generate_story
from lm2_jax.tokenizer import Tokenizer

PROMPT_TOKENS = 300
FEWEST_TOKENS = 10  # of a book's sentence; shorter ones are left out
_COLUMNS = {"input": "context", "question": "question", "target": "target"}
_GENERATED = ("qa1", "qa2", "qa3", "qa4", "qa5")


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A question about a context. Several answers are one target with commas: "apple,milk"."""

    context: str
    question: str
    target: str


def parse_length(name: str) -> int:
    """Parses a length such as 0k, 128k or 1M: decimal thousands and millions of tokens."""
    return int(name[:-1]) * {"k": 1_000, "M": 1_000_000}[name[-1]]


# --- Building ------------------------------------------------------------------------------------------------------


class BuiltSamples:
    """Samples of one length, each a function of (seed, index); at every length an index starts the same background.

    Args:
      questions: statements and one question each; those whose statements alone are too long are left out.
      length: tokens of the context and of the prompt around it; 0: statements only.
      counter: the tokenizer that counts the tokens.
      books: the background; None: built-in sentences.
      seed: of the background and of the statements' positions.
      count: the most samples to have.

    Raises UserError if no question fits, and, asked for a sample, if the books hold less text than its length.
    """

    def __init__(
        self,
        questions: Sequence[Story],
        length: int,
        counter: Tokenizer,
        books: Books | None,
        seed: tuple[int, ...],
        count: int,
    ) -> None:
        self._counter = counter
        self._budget = max(length - PROMPT_TOKENS, 0)
        self._books = books
        self._seed = seed
        self._count_tokens = functools.cache(lambda text: len(counter.encode(" " + text)))
        fitting = (q for q in questions if not length or self._facts_length(q) <= self._budget)
        self._questions = list(islice(fitting, count))
        if not self._questions:
            shortest = min(map(self._facts_length, questions))
            raise UserError(
                f"eval.babilong.lengths: {length} tokens leave {self._budget} for facts, and the shortest story has "
                f"{shortest}; ask for greater lengths"
            )

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Sample:
        *facts, question = self._questions[index]
        rng = np.random.default_rng((*self._seed, index))
        background = self._background(self._budget - self._facts_length(self._questions[index]), rng)
        positions = np.sort(rng.integers(0, len(background) + 1, size=len(facts))).tolist()
        context = interleave([fact.text for fact in facts], background, positions)
        return Sample(" ".join(context), question.text, question.answer)

    def _facts_length(self, story: Story) -> int:
        return sum(self._count_tokens(line.text) for line in story[:-1])

    def _background(self, budget: int, rng: np.random.Generator) -> list[str]:
        """Takes sentences of `budget` tokens, the last one cut to fit."""
        encode, taken, left = self._counter.encode, list[str](), budget
        for sentence in self._books.sentences(rng) if self._books else builtin_sentences(rng):
            if left <= 0:
                return taken
            ids = encode(" " + sentence)
            if self._books and len(ids) < FEWEST_TOKENS:
                continue
            if len(ids) > left:  # a cut may leave half a character
                sentence = self._counter.decode(ids[:left]).strip(" \ufffd")
            taken.append(sentence)
            left -= len(ids)
        if left > 0:
            raise UserError(
                f"eval.babilong.books: hold {budget - left:,} tokens of background, {budget:,} are needed for a length "
                f"of {self._budget + PROMPT_TOKENS:,}; name more books, or ask for shorter lengths"
            )
        return taken


def babi_questions(directory: str | AnyPath, task: BabilongTask, seed: int) -> tuple[list[Story], list[AnyPath]]:
    """Reads every question of a task, in a shuffled order, and lists the files they come from.

    Files are qaN_*test.txt of the directory, or, if a task has none, all its qaN_*.txt. Raises UserError without any.
    """
    directory = to_path(directory, "eval.babilong.babi")
    files = sorted(directory.glob(f"{task}_*test.txt")) or sorted(directory.glob(f"{task}_*.txt"))
    if not files:
        what = f"holds no {task}_*.txt" if directory.is_dir() else "is no directory"
        raise UserError(f"eval.babilong.babi: {directory} {what}; name a directory of bAbI files, such as en-10k")
    every = [sample for path in files for story in read_babi(path) for sample in question_samples(story)]
    if not every:
        raise UserError(f"eval.babilong.babi: {', '.join(map(str, files))}: no question among the statements")
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))], files


def generated_questions(task: BabilongTask, config: StoriesConfig, seed: int, count: int) -> list[Story]:
    """Makes up questions whose statements are those of no training story. Raises UserError beyond qa5."""
    if task not in _GENERATED:
        raise UserError(
            f"eval.babilong.babi is missing: the generator makes {', '.join(_GENERATED)}, and tasks asks for {task}; "
            "name a directory of bAbI files, or of samples (eval.babilong.path)"
        )
    rng, stories = np.random.default_rng((seed, _GENERATED.index(task))), list[Story]()
    fewest, most = config.facts
    while len(stories) < count:
        story = generate_story(task, rng, int(rng.integers(fewest, most + 1)), 0, 1)
        if is_held_out(story):
            stories.append(story)
    return stories


# --- Reading -------------------------------------------------------------------------------------------------------


def find_samples(directory: str | AnyPath, task: BabilongTask, length: str) -> list[AnyPath]:
    """Finds the files with the samples of a task and a length, in a directory downloaded from the hub (or like it).

    {length}/{task}.json, .jsonl, .parquet or -*.parquet (RMT-team/babilong-1k-samples), or {task}/{length}.json and so
    on; either also inside data/ (RMT-team/babilong). Raises UserError without any.
    """
    directory = to_path(directory, "eval.babilong.path")
    for folder in (directory, directory / "data"):
        for name in (f"{length}/{task}", f"{task}/{length}"):
            for ending in (".json", ".jsonl", ".parquet", "-*.parquet"):
                if files := sorted(folder.glob(name + ending)):
                    return files
    what = f"holds no {length}/{task}.json or .parquet" if directory.is_dir() else "is no directory"
    raise UserError(f"eval.babilong.path: {directory} {what}; download RMT-team/babilong, or ask for what it holds")


def read_samples(files: Sequence[AnyPath]) -> list[Sample]:
    """Reads the files of `find_samples`. Raises UserError for one that cannot be read, is empty or lacks a column."""
    samples = [_to_sample(row, f"{path}: row {n}") for path in files for n, row in enumerate(_rows(path))]
    if not samples:
        raise UserError(f"{', '.join(map(str, files))}: no samples; the file is empty")
    return samples


def _rows(path: AnyPath) -> list[Any]:
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is neither a JSON list nor JSON lines ({error})") from None


def _parquet_rows(path: AnyPath) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow, or take the JSON files") from None
    try:
        return pyarrow.parquet.read_table(local_copy(path)).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are among them
        raise UserError(f"{path}: cannot be read as parquet ({error})") from None


def _to_sample(row: Any, where: str) -> Sample:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: holds {type(row).__name__}; expected an object with {', '.join(_COLUMNS)}")
    missing = [column for column in _COLUMNS if column not in row]
    if missing:
        raise UserError(f"{where}: column {missing[0]!r} is missing; its columns are {', '.join(map(repr, row))}")
    wrong = [column for column in _COLUMNS if not isinstance(row[column], str)]
    if wrong:
        raise UserError(f"{where}: column {wrong[0]!r} holds {type(row[wrong[0]]).__name__}; expected text")
    return Sample(**{name: row[column].strip() for column, name in _COLUMNS.items()})
