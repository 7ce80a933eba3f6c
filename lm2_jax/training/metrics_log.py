"""Metrics of the steps: kept on the devices until they are fetched, counted, written and shown together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from lm2_jax.common.errors import TrainingFailed
from lm2_jax.common.records import Record
from lm2_jax.config import Config, StageConfig
from lm2_jax.training.curriculum import Progress
from lm2_jax.training.health import Health
from lm2_jax.training.reporting import Reporter, SilentReporter
from lm2_jax.training.timing import StepTimer


class MetricsLog:
    """Metrics that are still on the devices, until `flush` fetches and writes them."""

    def __init__(self, reporter: Reporter | SilentReporter, timer: StepTimer, config: Config) -> None:
        self._reporter, self._timer, self._config = reporter, timer, config
        self._pending: list[tuple[Record, dict[str, jax.Array]]] = []
        self._health = Health()

    def add(self, metrics: dict[str, jax.Array], progress: Progress, stage: StageConfig) -> None:
        """Adds the metrics of the step that was just started; `progress` is that after it."""
        shape = {"segments": stage.segments, "segment_length": stage.segment_length}
        record = {"step": progress.step, **shape, "stage": progress.stage, "epoch": progress.data["epoch"]}
        self._pending.append((record, metrics))

    def amend(self, more: Record) -> None:
        """Adds keys to the newest step's record."""
        self._pending[-1][0].update(more)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for the steps; what is done then counts as no step's time."""
        jax.block_until_ready([metrics for _, metrics in self._pending])
        with self._timer.pause():
            yield

    def flush(self, progress: Progress) -> Progress:
        """Waits for the steps, writes their records and shows the last; returns the progress with their counts.

        Raises TrainingFailed if too many steps in a row were not finite.
        """
        if not self._pending:
            return progress
        fetched = jax.device_get([metrics for _, metrics in self._pending])
        newest, steps, records = self._pending[-1][0], len(fetched), []
        lap = self._timer.lap(steps, self._config.data.batch_size * newest["segments"] * newest["segment_length"])
        tokens_per_second = sum(int(m["tokens_in_step"]) for m in fetched) / (steps * lap["step_seconds"])
        for (extra, _), metrics in zip(self._pending, fetched, strict=True):
            metrics = {name: value.item() for name, value in metrics.items()}
            tokens, answers, correct = (metrics.pop(f"{name}_in_step") for name in ("tokens", "answers", "correct"))
            progress = progress.counted(tokens, correct, answers)
            record = {"step": extra["step"], "tokens": progress.tokens, **metrics, **extra}
            record["accuracy"] = correct / answers if answers else None
            record |= {"tokens_per_second": tokens_per_second, **lap, "time": time.time()}
            records.append(record)
        self._pending = []
        self._reporter.record(records)
        for record in records:
            for warning in self._health.look(record):
                self._reporter.log(f"warning: {warning}")
        last, stages, max_skipped = records[-1], len(self._config.stages), self._config.train.max_skipped_steps
        self._reporter.show(last, f"stage {last['stage'] + 1}/{stages}" if stages > 1 else "")
        if max_skipped and last["skipped_in_a_row"] >= max_skipped:
            raise TrainingFailed(
                f"{last['skipped_in_a_row']} steps in a row up to step {last['step']} had a loss or gradient that was "
                "not finite (limit: train.max_skipped_steps); start another run with a lower optim.learning_rate or "
                "longer optim.warmup_steps"
            )
        return progress
