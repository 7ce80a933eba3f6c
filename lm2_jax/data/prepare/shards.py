"""The steps of preparing data: inputs -> chunks of raw documents -> tokens -> shards.

Which documents a shard holds depends on the inputs alone: they are put in groups of `shard_bytes` (a larger one is a
group by itself), a group is read in order, and a shard is closed after the chunk that fills it. `workers.py` does these
steps in processes of one machine, `beam.py` on Apache Beam, and `plan.py` is about what comes before and after.

Until the end the output has a directory `.progress` with the plan and a report of each whole shard; a shard without
one is made again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import write_atomically
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.prepare.chunks import Chunk, Input, Unreachable
from lm2_jax.data.prepared import Encoded, Format, Shard, write_shard
from lm2_jax.data.texts import tokenize
from lm2_jax.tokenizer import Tokenizer, load_tokenizer

PROBLEMS_KEPT = 100
_PROGRESS = ".progress"
_OPTIONS = ("separator", "field", "split", "shard_bytes", "format")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How inputs are prepared.

    Attributes:
      tokenizer: its kind and file.
      output: the directory to fill.
      format: arrayrecord for training here; bin for the official layout (begin token, text, no end token).
      shard_bytes: of raw documents in a shard.
      on_error: skip damaged documents, or stop at the first.
      separator, field, split: as the inputs were opened; see `inputs.open_inputs`.
    """

    tokenizer: TokenizerConfig
    output: Path
    format: Format = "arrayrecord"
    shard_bytes: int = 256_000_000
    on_error: Literal["stop", "skip"] = "stop"
    separator: str | None = None
    field: str = "text"
    split: str = "train"

    @property
    def progress_dir(self) -> Path:
        """The directory of unfinished work."""
        return self.output / _PROGRESS

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once in each process. Raises UserError if it cannot be read."""
        return _load_tokenizer(self.tokenizer)

    def options(self) -> dict[str, Any]:
        """The settings that change the output, besides tokenizer and inputs."""
        return {name: getattr(self, name) for name in _OPTIONS}


_load_tokenizer = functools.cache(load_tokenizer)


@dataclasses.dataclass(frozen=True)
class Task:
    """A chunk of an input on its way into a shard.

    Attributes:
      shard: its name.
      order: the task's number in its shard.
      chunk: None at an input's end.
      problem: the reason why the input could not be read to its end.
    """

    shard: str
    order: int
    input: Input
    chunk: Chunk | None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Result(Encoded):
    """The result of a task: its documents, and its share of the shard's report."""

    empty: int = 0
    problems: tuple[str, ...] = ()
    source: dict[str, Any] | None = None  # identity of the input that ended here


class Report(BaseModel):
    """Contents of a whole shard, and what was left out of it."""

    model_config = ConfigDict(frozen=True)

    shard: Shard
    empty: int
    skipped: int
    problems: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]


MakeShards = Callable[[Sequence[tuple[Input, ...]], Settings, Mapping[str, Report], int], None]
"""Makes the shards of groups, except those done already: (groups, settings, done, vocab_size)."""


def group_inputs(inputs: Sequence[Input], shard_bytes: int) -> list[tuple[Input, ...]]:
    """Groups consecutive inputs up to `shard_bytes` together; larger ones and those of unknown size stand alone."""
    groups: list[list[Input]] = []
    room = 0
    for source in inputs:
        size = source.size
        if size is None or size > room or not groups:
            groups.append([])
            room = shard_bytes
        groups[-1].append(source)
        room = 0 if size is None else room - size
    return [tuple(group) for group in groups]


def is_whole(number: int, group: Sequence[Input], done: Mapping[str, Report]) -> bool:
    """True if every shard of a group is there, so that nothing of it has to be read again."""
    names = sorted(name for name in done if name.startswith(f"{number:05d}-"))
    gapless = names == [_shard_name(number, place) for place in range(len(names))]
    return gapless and sum(len(done[name].sources) for name in names) == len(group)  # all were read to their ends


def _shard_name(group: int, place: int) -> str:
    return f"{group:05d}-{place:05d}"


def read_tasks(number: int, group: Sequence[Input], shard_bytes: int) -> Iterator[Task]:
    """Yields the tasks of a group, shard after shard. Raises Unreachable as inputs do."""
    shard, order, filled = 0, 0, 0
    for source in group:
        chunks, problem = source.read(), None
        while True:
            try:
                chunk = next(chunks, None)
            except Unreachable:
                raise
            except UserError as error:
                chunk, problem = None, str(error)
            if chunk is not None and filled >= shard_bytes:
                shard, order, filled = shard + 1, 0, 0
            yield Task(_shard_name(number, shard), order, source, chunk, problem)
            order += 1
            if chunk is None:
                break
            filled += chunk.size


def run_task(task: Task, settings: Settings) -> Result:
    """Tokenises a task's chunk; at an input's end, takes its checksum."""
    tokenizer = settings.load_tokenizer()
    tokens, index, problems, empty = [np.zeros(0, np.int32)], [], [], 0
    if task.problem:
        problems.append(task.problem)
    for document in task.input.parse(task.chunk) if task.chunk else ():
        if isinstance(document, UserError):
            problems.append(str(document))
        elif isinstance(document, np.ndarray):
            tokens.append(document)
            index.append((len(document), -1))
        elif document.strip():
            ids = tokenize(document, tokenizer)
            if settings.format == "bin" and tokenizer.eos_id is not None:
                ids = ids[:-1]  # the official shards have none
            tokens.append(ids)
            index.append((len(ids), len(document.encode())))
        else:
            empty += 1
    return Result(
        np.concatenate(tokens),
        np.array(index, np.int32).reshape(-1, 2),
        empty,
        tuple(problems),
        source=None if task.chunk else task.input.identity(),
    )


def finish_shard(name: str, results: Iterable[Result], settings: Settings, vocab_size: int) -> Report:
    """Writes a shard and its report from its results in order."""
    empty, problems, sources = 0, [], []

    def noted() -> Iterator[Result]:
        nonlocal empty
        for result in results:
            empty += result.empty
            problems.extend(result.problems)
            if result.source is not None:
                sources.append(result.source)
            yield result

    shard = write_shard(settings.output, settings.progress_dir, name, settings.format, noted(), vocab_size)
    report = Report(shard=shard, empty=empty, skipped=len(problems), problems=problems[:PROBLEMS_KEPT], sources=sources)
    write_atomically(settings.progress_dir / f"{name}.json", report.model_dump_json())
    return report


def raise_first(problems: Iterable[str], settings: Settings) -> None:
    """With `on_error` stop, raises UserError for the first problem."""
    if settings.on_error == "stop" and (problem := next(iter(problems), None)):
        raise UserError(
            f"{problem}\ncall again with --on-error skip to leave out such documents and unreadable rests of "
            f"files; or repair it, remove {settings.output} and call again"
        )
