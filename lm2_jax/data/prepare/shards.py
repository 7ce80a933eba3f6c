"""The steps of preparing data: inputs -> chunks of raw documents -> tokens -> shards.

Which documents a shard holds depends on the inputs alone: they are put in groups of `shard_bytes` (a larger one is a
group by itself), a group is read in order, and a shard is closed after the chunk that fills it. `run_locally` does
these steps in processes of one machine, `beam.py` on Apache Beam; `plan.py` is about what comes before and after.

Until the end the output has a directory `.progress` with the plan and a report of each whole shard; a shard without
one is made again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import write_atomically
from lm2_jax.common.storage import AnyPath
from lm2_jax.common.trees import scratch_in
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.prepare.chunks import Chunk, Input, Unreachable
from lm2_jax.data.prepared import Format, Shard
from lm2_jax.data.shard_writing import Encoded, write_shard
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
      output: the directory to fill, of this machine or of a store.
      format: arrayrecord for training here; bin for the official layout (begin token, text, no end token).
      shard_bytes: of raw documents in a shard.
      on_error: skip damaged documents, or stop at the first.
      separator, field, split: as the inputs were opened; see `inputs.open_inputs`.
    """

    tokenizer: TokenizerConfig
    output: AnyPath
    format: Format = "arrayrecord"
    shard_bytes: int = 256_000_000
    on_error: Literal["stop", "skip"] = "stop"
    separator: str | None = None
    field: str = "text"
    split: str = "train"

    @property
    def progress_dir(self) -> AnyPath:
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
            if settings.format == "bin" and tokenizer.special.eos_id is not None:
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

    with scratch_in(settings.progress_dir) as scratch:
        shard = write_shard(settings.output, scratch, name, settings.format, noted(), vocab_size)
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


# --- On this machine: one process reads and writes in order, the others tokenise chunks ------------------------------


@dataclasses.dataclass
class Tally:
    """Progress of this process.

    Attributes:
      total: bytes of all inputs; None if one is not known.
      read: bytes of the inputs, including those of shards that were whole at the start.
      tokens: made by this process.
      skipped: damaged documents.
    """

    total: int | None
    read: int = 0
    tokens: int = 0
    skipped: int = 0


def run_locally(workers: int, show: Callable[[Tally], None] = lambda tally: None) -> MakeShards:
    """Tokenises in `workers` processes, or in this one if it is 1; `show` displays progress."""

    def run(
        groups: Sequence[tuple[Input, ...]], settings: Settings, done: Mapping[str, Report], vocab_size: int
    ) -> None:
        sizes = [source.size for group in groups for source in group]
        tally = Tally(total=None if None in sizes else sum(sizes))
        position: dict[Input, int] = {}

        def count(task: Task) -> None:
            now = task.chunk.read if task.chunk else task.input.size or 0
            before = position.get(task.input, 0)
            position[task.input] = max(now, before)
            tally.read += max(now - before, 0)

        def to_do() -> Iterator[Task]:
            for number, group in enumerate(groups):
                if is_whole(number, group, done):
                    tally.read += sum(source.size or 0 for source in group)
                    continue
                for task in read_tasks(number, group, settings.shard_bytes):
                    if task.shard not in done:
                        yield task
                    else:
                        count(task)

        def counted(pairs: Iterable[tuple[Task, Result]]) -> Iterator[Result]:
            for task, result in pairs:
                count(task)
                tally.tokens += len(result.tokens)
                tally.skipped += len(result.problems)
                show(tally)
                raise_first(result.problems, settings)
                yield result

        pairs = _in_order(to_do(), settings, workers)
        for name, of_shard in itertools.groupby(pairs, key=lambda pair: pair[0].shard):
            finish_shard(name, counted(of_shard), settings, vocab_size)

    return run


def _in_order(tasks: Iterable[Task], settings: Settings, workers: int) -> Iterator[tuple[Task, Result]]:
    """Yields tasks and their results in order; a few are under way at a time."""
    if workers == 1:
        yield from ((task, run_task(task, settings)) for task in tasks)
        return
    others = multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    waiting: collections.deque[tuple[Task, concurrent.futures.Future[Result]]] = collections.deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(run_task, task, settings)))
            if len(waiting) > 3 * workers:
                task, future = waiting.popleft()
                yield task, future.result()
        while waiting:
            task, future = waiting.popleft()
            yield task, future.result()
    except BaseException:
        for process in set(multiprocessing.active_children()) - set(others):
            process.terminate()  # a task may take minutes, and nobody waits for it now
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Ends this process with its parent; a pool's processes would otherwise wait for tasks after it is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
