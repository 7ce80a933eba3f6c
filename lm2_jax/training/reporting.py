"""Reports of a run while it trains: progress on the terminal, metrics.jsonl and trackers."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lm2_jax.common.errors import TrainingFailed
from lm2_jax.common.journal import Journal
from lm2_jax.common.progress import clock
from lm2_jax.common.records import Record
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import Config
from lm2_jax.training.trackers import open_trackers


class Reporter:
    """Writes one record per step; use as a context manager."""

    def __init__(self, config: Config, run_dir: AnyPath, first_step: int) -> None:
        """first_step: the step after which this process begins."""
        self.console = Console(highlight=False, soft_wrap=True)
        self._file = Journal(run_dir / "metrics.jsonl")
        self._trackers = open_trackers(config, run_dir, first_step + 1)
        self._last = config.train.steps
        self._stage, self._stage_first, self._stage_began = "", first_step, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), console=self.console
        )
        self._task = self._bar.add_task("training", total=self._last, completed=first_step, note="")

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()
        with contextlib.suppress(OSError):  # a full disk was reported when it was written to
            for output in (*self._trackers, self._file):
                output.close()

    def log(self, text: str | Table) -> None:
        """Prints a line, or a table."""
        self.console.print(text, markup=False)

    def record(self, records: Iterable[Record]) -> None:
        """Appends records to metrics.jsonl, durably, and to the trackers. Numbers that are not finite become null.

        Raises TrainingFailed if they cannot be written.
        """
        try:
            for record in records:
                self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
                for tracker in self._trackers:
                    tracker.add(record)
            self._file.flush()
            for tracker in self._trackers:
                tracker.flush()
        except OSError as error:
            raise TrainingFailed(
                f"{self._file}: cannot be written ({error.strerror}). When it can be written to again, the same "
                "command resumes from the newest checkpoint"
            ) from None

    def show(self, record: Record, stage: str) -> None:
        """Shows the newest record as a line, with the time left at the speed of its stage."""
        step, now = record["step"], time.monotonic()
        left = (now - self._stage_began) / max(step - self._stage_first, 1) * (self._last - step)
        if stage != self._stage:
            self._stage, self._stage_first, self._stage_began = stage, step, now
        parts = [f"step {step}/{self._last}", f"loss {record['loss']:.4f}"]
        if record.get("accuracy") is not None:
            parts.append(f"answers {record['accuracy']:.1%}")
        if record.get("validation_loss") is not None:
            parts.append(f"validation {record['validation_loss']:.4f}")
        parts += [stage, f"{record['tokens_per_second']:,.0f} tokens/s", *_times(record), f"{clock(left)} left"]
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, note="  ".join(parts))
        else:
            self.log("  ".join(parts))


class SilentReporter(contextlib.AbstractContextManager):
    """Stands for `Reporter` in all processes of a run but the first; reports nothing."""

    def __exit__(self, *_: object) -> None: ...

    def log(self, text: str | Table) -> None:
        """Does nothing."""

    def record(self, records: Iterable[Record]) -> None:
        """Does nothing."""

    def show(self, record: Record, stage: str) -> None:
        """Does nothing."""


def _times(record: Record) -> Iterator[str]:
    """Figures of StepTimer's in words, those that are known."""
    yield f"{record['step_seconds']:.3g} s/step"
    if (waiting := record["data_seconds"] / record["step_seconds"]) >= 0.005:
        yield f"data {waiting:.0%}"
    for name in ("mfu", "goodput"):
        if record[name] is not None:
            yield f"{name.replace('mfu', 'MFU')} {record[name]:.0%}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
