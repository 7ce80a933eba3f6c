"""Preparing data: inputs -> chunks of raw documents -> tokens -> shards, on many processes, and on again after a kill.

Which documents a shard holds depends on the inputs alone: they are put in groups of `shard_bytes` (a larger one is a
group by itself), a group is read in order, and a shard is closed after the chunk that fills it. One process reads and
writes, in order; the others tokenise chunks. `prepare_beam.py` does the same steps on Apache Beam.

Until the end the output has a directory `.progress` with the plan and a report of each whole shard; a shard without
one is made again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import lock_directory, write_atomically
from lm2_jax.common.untrusted import short_repr
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.prepare.inputs import Chunk, Input, Unreachable
from lm2_jax.data.prepared import (
    MANIFEST,
    Encoded,
    Format,
    Manifest,
    Shard,
    TokenizerRecord,
    data_file,
    index_path,
    make_manifest,
    read_manifest,
    write_shard,
)
from lm2_jax.data.texts import tokenize
from lm2_jax.tokenizer import Tokenizer, load_tokenizer

PROBLEMS_KEPT = 100
_DIFFERENCES_SHOWN = 5
_PROGRESS = ".progress"
_PLAN = "plan.json"
_SHOWN_AT_A_GLANCE = ("name", "bytes", "split", "revision")  # of an input, without its checksum
_OPTIONS = ("separator", "field", "split", "shard_bytes", "format")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How inputs are prepared.

    Attributes:
      tokenizer: its kind and file.
      output: the directory to fill.
      format: arrayrecord for training here; bin for the official layout (begin token, text, no end token).
      shard_bytes: of raw documents in a shard.
      on_error: skip documents with something wrong, or stop at the first.
      separator, field, split: as in `inputs.open_inputs`; what inputs were opened with.
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
        """Where unfinished work is."""
        return self.output / _PROGRESS

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once in each process. Raises UserError if it cannot be read."""
        return _load_tokenizer(self.tokenizer)

    def options(self) -> dict[str, Any]:
        """What changes the output, besides tokenizer and inputs."""
        return {name: getattr(self, name) for name in _OPTIONS}


_load_tokenizer = functools.cache(load_tokenizer)


@dataclasses.dataclass(frozen=True)
class Task:
    """A chunk of an input on its way into a shard.

    Attributes:
      shard: its name.
      order: of the task among those of the shard.
      chunk: None at an input's end.
      problem: what kept the input from being read to its end.
    """

    shard: str
    order: int
    input: Input
    chunk: Chunk | None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Result(Encoded):
    """A task, done: its documents, and what there is to report."""

    empty: int = 0
    problems: tuple[str, ...] = ()
    source: dict[str, Any] | None = None  # identity of the input that ended here


class Report(BaseModel):
    """What a whole shard holds, and what was left out of it."""

    model_config = ConfigDict(frozen=True)

    shard: Shard
    empty: int
    skipped: int
    problems: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]


@dataclasses.dataclass
class Tally:
    """How far this process is.

    Attributes:
      read: bytes of the inputs, those of shards that were whole already included.
      total: bytes of all inputs; None where one does not say.
      tokens: made by this process.
      skipped: documents with something wrong.
    """

    total: int | None
    read: int = 0
    tokens: int = 0
    skipped: int = 0


# --- The steps -----------------------------------------------------------------------------------------------------


def group_inputs(inputs: Sequence[Input], shard_bytes: int) -> list[tuple[Input, ...]]:
    """Consecutive inputs of `shard_bytes` together, or single larger ones; one of unknown size is by itself."""
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
    """Whether every shard of a group is there, and so nothing of it has to be read again."""
    names = sorted(name for name in done if name.startswith(f"{number:05d}-"))
    gapless = names == [_shard_name(number, place) for place in range(len(names))]
    return gapless and sum(len(done[name].sources) for name in names) == len(group)  # all have come to their ends


def _shard_name(group: int, place: int) -> str:
    return f"{group:05d}-{place:05d}"


def read_tasks(number: int, group: Sequence[Input], shard_bytes: int) -> Iterator[Task]:
    """The tasks of a group, shard after shard. Raises Unreachable as inputs do."""
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
    """Writes a shard and its report, from its results in order."""
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


# --- From a plan to a manifest -------------------------------------------------------------------------------------


Program = Callable[[Sequence[tuple[Input, ...]], Settings, Mapping[str, Report], int], None]
"""Makes the shards of groups, but for those that are done: (groups, settings, done, vocab_size)."""


def prepare(inputs: Sequence[Input], settings: Settings, runner: Program) -> Manifest:
    """Fills `settings.output`, or goes on with it, or finds it done.

    Raises UserError for a tokenizer that cannot be read, an output that holds something else, no document at all, and,
    with `on_error` stop, for the first thing that is wrong with an input; Unreachable if one cannot be read now. Then
    the output can still be gone on with.
    """
    tokenizer = settings.load_tokenizer()
    if settings.format == "bin" and tokenizer.bos_id is None:
        raise UserError("--tokenizer: has no begin token, with which documents of .bin shards begin")
    output, progress_dir = settings.output, settings.progress_dir
    if (output / MANIFEST).exists():
        manifest = _finished(inputs, settings, tokenizer)
        shutil.rmtree(progress_dir, ignore_errors=True)  # of a run that was killed after its manifest
        return manifest
    try:
        progress_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be made ({error.strerror})") from None
    with lock_directory(progress_dir, f"{output}: another process prepares it; wait, or give another --output"):
        _keep_plan(_plan(inputs, settings, tokenizer), settings)
        done = _reports(progress_dir)
        _raise_first(_problems(done), settings)
        runner(group_inputs(inputs, settings.shard_bytes), settings, done, tokenizer.vocab_size)
        reports = _reports(progress_dir)
        _raise_first(_problems(reports), settings)
        manifest = _finish(reports, settings, tokenizer)
        shutil.rmtree(progress_dir)
    return manifest


def _raise_first(problems: Iterable[str], settings: Settings) -> None:
    """With `on_error` stop, raises UserError for the first problem."""
    if settings.on_error == "stop" and (problem := next(iter(problems), None)):
        raise UserError(
            f"{problem}\ncall again with --on-error skip to leave such documents out, and what of a file cannot be "
            f"read; or mend it, remove {settings.output} and call again"
        )


def _plan(inputs: Sequence[Input], settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must be the same for unfinished work to be gone on with."""
    return {
        "tokenizer": tokenizer.fingerprint(),
        **settings.options(),
        "inputs": [source.state() for source in inputs],
    }


def _keep_plan(plan: dict[str, Any], settings: Settings) -> None:
    """Writes the plan. Raises UserError if unfinished work has another one."""
    path = settings.progress_dir / _PLAN
    if not path.exists():
        others = [child.name for child in settings.output.iterdir() if child != settings.progress_dir]
        if others:
            raise UserError(
                f"--output: {settings.output} holds other files ({', '.join(sorted(others)[:3])}); give a new directory"
            )
        write_atomically(path, json.dumps(plan, indent=1) + "\n")
    elif differences := _differences(json.loads(path.read_text()), plan):
        raise UserError(
            f"--output: {settings.output} holds unfinished work of another preparation; give another --output, remove "
            "it, or undo:\n" + "\n".join(differences)
        )


def _finished(inputs: Sequence[Input], settings: Settings, tokenizer: Tokenizer) -> Manifest:
    """The manifest that is there. Raises UserError if it is of another preparation."""
    manifest = read_manifest(settings.output, "--output")
    before = {
        "tokenizer": manifest.tokenizer.fingerprint,
        **manifest.settings,
        "inputs": [{key: source.get(key) for key in _SHOWN_AT_A_GLANCE} for source in manifest.sources],
    }
    now = {
        "tokenizer": tokenizer.fingerprint(),
        **settings.options(),
        "inputs": [{key: source.state().get(key) for key in _SHOWN_AT_A_GLANCE} for source in inputs],
    }
    if differences := _differences(before, now):
        raise UserError(
            f"--output: {settings.output} holds another preparation; give another --output, or remove it:\n"
            + "\n".join(differences)
        )
    return manifest


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, a line each; inputs one by one."""
    found = _changes(before | {"inputs": None}, now | {"inputs": None})
    inputs = list(itertools.zip_longest(before["inputs"], now["inputs"], fillvalue={}))
    changed = [(there, here) for there, here in inputs if there != here]
    for there, here in changed[:_DIFFERENCES_SHOWN]:
        found.append(f"input {here.get('name', there.get('name'))}: {', '.join(_changes(there, here))}")
        if here.get("name") == there.get("name") and here.get("revision") != there.get("revision"):
            found[-1] += "; owner/name@revision names one of them"
    if len(changed) > _DIFFERENCES_SHOWN:
        found.append(f"and {len(changed) - _DIFFERENCES_SHOWN} inputs more")
    return [f"  {line}" for line in found]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    pairs = [(key, before.get(key), now.get(key)) for key in before | now]
    return [f"{key}: {short_repr(there)} there, {short_repr(here)} now" for key, there, here in pairs if there != here]


def _reports(progress_dir: Path) -> dict[str, Report]:
    """The reports of all whole shards by name, in order."""
    paths = sorted(path for path in progress_dir.glob("*.json") if path.name != _PLAN)
    return {path.stem: Report.model_validate_json(path.read_bytes()) for path in paths}


def _problems(reports: dict[str, Report]) -> list[str]:
    return [problem for report in reports.values() for problem in report.problems]


def _finish(reports: dict[str, Report], settings: Settings, tokenizer: Tokenizer) -> Manifest:
    """Gives shards their last names, copies the tokenizer, and writes the manifest after everything else."""
    shards = [report.shard for report in reports.values() if report.shard.documents]
    problems = _problems(reports)
    if not shards:
        raise UserError("\n".join(["--input: no document is left", *problems[:5]]))
    if settings.format == "bin":  # the official trainer knows files by their names: the first is for validation
        names = [f"corpus_{'train' if number else 'val'}_{number:06d}" for number in range(len(shards))]
        for shard, name in zip(shards, names, strict=True):
            for at in (functools.partial(data_file, format="bin"), index_path):
                if (before := at(settings.output, shard.name)).exists():
                    before.replace(at(settings.output, name))
        shards = [shard.model_copy(update={"name": name}) for shard, name in zip(shards, names, strict=True)]
    text = make_manifest(
        format=settings.format,
        tokenizer=_keep_tokenizer(settings, tokenizer),
        empty=sum(report.empty for report in reports.values()),
        skipped=sum(report.skipped for report in reports.values()),
        problems=tuple(problems[:PROBLEMS_KEPT]),
        settings=settings.options(),
        sources=tuple(source for report in reports.values() for source in report.sources),
        shards=tuple(shards),
    )
    write_atomically(settings.output / MANIFEST, text)
    return read_manifest(settings.output, "--output")


def _keep_tokenizer(settings: Settings, tokenizer: Tokenizer) -> TokenizerRecord:
    kind, path = settings.tokenizer.kind, settings.tokenizer.path
    file = None
    if path is not None:
        file = "tokenizer.json" if kind == "tokenizers" else "tokenizer.model"
        shutil.copyfile(path, settings.output / file)
    return TokenizerRecord(kind=kind, file=file, fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size)


# --- On this machine -----------------------------------------------------------------------------------------------


def run_locally(workers: int, show: Callable[[Tally], None] = lambda tally: None) -> Program:
    """A runner that tokenises in `workers` processes; in this one if it is 1. `show` is told how far it is."""

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

        def told(pairs: Iterable[tuple[Task, Result]]) -> Iterator[Result]:
            for task, result in pairs:
                count(task)
                tally.tokens += len(result.tokens)
                tally.skipped += len(result.problems)
                show(tally)
                _raise_first(result.problems, settings)
                yield result

        pairs = _in_order(to_do(), settings, workers)
        for name, of_shard in itertools.groupby(pairs, key=lambda pair: pair[0].shard):
            finish_shard(name, told(of_shard), settings, vocab_size)

    return run


def _in_order(tasks: Iterable[Task], settings: Settings, workers: int) -> Iterator[tuple[Task, Result]]:
    """Tasks and their results; a few are waited for at a time."""
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
            process.terminate()  # a task may take minutes, and nobody waits for it any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A pool's processes would outlive a killed parent, waiting for tasks."""
    multiprocessing.parent_process().join()
    os._exit(1)
