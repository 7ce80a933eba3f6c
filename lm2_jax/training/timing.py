"""A run's time: in its steps, in waiting for data, and in all the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from lm2_jax.batch import Batch
from lm2_jax.common.records import Record
from lm2_jax.model.sizes import model_flops
from lm2_jax.parallel.chips import chip_of

TrainStep = Callable[[Any, Batch], tuple[Any, Any]]


class StepTimer:
    """Times the steps of a run.

    The devices run steps while the host goes on, so a step is not timed by itself: a lap, which begins and ends when no
    step is running, is divided by its steps. What is done in `pause` belongs to no step.
    """

    def __init__(self, started: float, kept_before: float | None, parameters: int, mesh: Mesh) -> None:
        """Begins the first lap.

        Args:
          started: the run's first start, in seconds since the epoch.
          kept_before: seconds in its steps up to now, without those that are done again; None if unknown.
          parameters: N of the model.
          mesh: all devices of the run.
        """
        chip = chip_of(mesh.devices.flat[0].device_kind)
        self._peak = chip and chip.flops * mesh.size  # operations a second; None if unknown
        self._parameters = parameters
        self._kept = kept_before
        self._age, self._began = time.time() - started, time.monotonic()
        self._lap_began, self._paused, self._waited = self._began, 0.0, 0.0
        self._pauses = 0  # one may be within another

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Counts its time as no step's; no step must be running on the devices, or be waited for within it."""
        began, self._pauses = time.monotonic(), self._pauses + 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._paused += time.monotonic() - began

    def next_of(self, windows: Iterator[Batch]) -> Batch:
        """The next window; the time that it takes counts as waiting for data, and is a part of the step's."""
        began = time.monotonic()
        window = next(windows)
        self._waited += time.monotonic() - began
        return window

    def timed(self, step: TrainStep) -> TrainStep:
        """The step, whose compilation, in the first call for each shape of windows, is a pause."""
        shapes: set[tuple[int, ...]] = set()

        def call(state: Any, batch: Batch) -> tuple[Any, Any]:
            known = batch.tokens_BST.shape in shapes
            shapes.add(batch.tokens_BST.shape)
            with contextlib.nullcontext() if known else self.pause():
                return step(state, batch)

        return call

    def lap(self, steps: int, tokens: int) -> Record:
        """Ends a lap of so many steps, each of a window of so many tokens; returns figures for their records.

        step_seconds and data_seconds are those of one step. mfu is model FLOPs over what the devices could do in that
        time; null where their peak is not known. goodput is the share of the time since the run's first start that
        went into steps, those done again after a crash counted once; null where it is not known.
        """
        now = time.monotonic()
        inside = max(now - self._lap_began - self._paused, 1e-9)
        record: Record = {"step_seconds": inside / steps, "data_seconds": self._waited / steps, "mfu": None}
        if self._peak:
            record["mfu"] = model_flops(self._parameters, steps * tokens) / (self._peak * inside)
        self._lap_began, self._paused, self._waited = now, 0.0, 0.0
        if self._kept is not None:
            self._kept += inside
        return record | {"goodput": self._goodput(now)}

    def _goodput(self, now: float) -> float | None:
        age = self._age + now - self._began
        if self._kept is None or age < self._kept:  # the clock was set
            return None
        return self._kept / age
