"""Making shards on this machine: one process reads and writes in order, the others tokenise chunks."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lm2_jax.data.prepare.chunks import Input
from lm2_jax.data.prepare.shards import (
    MakeShards,
    Report,
    Result,
    Settings,
    Task,
    finish_shard,
    is_whole,
    raise_first,
    read_tasks,
    run_task,
)


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
