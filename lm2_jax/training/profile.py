"""A trace of a few steps for XProf: when each operation ran on each device, and for how long."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from lm2_jax.batch import Batch
from lm2_jax.common.storage import AnyPath
from lm2_jax.common.trees import copy_tree
from lm2_jax.config import Config, ProfileConfig
from lm2_jax.parallel.processes import is_first
from lm2_jax.training.timing import StepTimer, TrainStep


@contextlib.contextmanager
def traced(
    step: TrainStep, config: Config, run_dir: AnyPath, done: int, timer: StepTimer, log: Callable[[str], None]
) -> Iterator[TrainStep]:
    """The step, which writes the trace that train.profile asks for into the run's tensorboard/; the first process does.

    done: steps of the run before the first call. A run that is resumed after the steps to trace says so.
    """
    profile = config.train.profile
    if profile is None or not is_first():
        yield step
    elif done >= profile.last:
        log(f"train.profile: steps {profile.start} to {profile.last} are done already; nothing is traced")
        yield step
    else:
        trace = _TracedStep(step, profile, run_dir / "tensorboard", done, timer, log)
        try:
            yield trace
        finally:  # the run may have been stopped in the midst of them
            trace.end()


class _TracedStep:
    def __init__(
        self,
        step: TrainStep,
        profile: ProfileConfig,
        directory: AnyPath,
        done: int,
        timer: StepTimer,
        log: Callable[[str], None],
    ) -> None:
        self._step, self._number, self._directory, self._timer, self._log = step, done, directory, timer, log
        self._first, self._last = max(profile.start, done + 1), profile.last
        self._here: tempfile.TemporaryDirectory | None = None  # while a trace is going on

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        self._number += 1
        if self._number == self._first:
            self._begin()
        with jax.profiler.StepTraceAnnotation("train", step_num=self._number):
            result = self._step(state, batch)
        if self._number == self._last:
            jax.block_until_ready(result)
            self.end()
        return result

    def _begin(self) -> None:
        options = jax.profiler.ProfileOptions()
        # JAX would name a trace by the second in which it ends, and the later of two overwrites the other
        options.session_id = f"steps_{self._first}_to_{self._last}"
        options.python_tracer_level = 0  # it would hook every Python call of every thread
        # Not into the run directory: a trace that JAX 0.10 fails to write keeps the process from any other
        here = tempfile.TemporaryDirectory()
        try:
            jax.profiler.start_trace(here.name, profiler_options=options)
        except RuntimeError as error:  # one that is going on already
            here.cleanup()
            self._log(f"warning: train.profile: nothing is traced ({error})")
        else:
            self._here = here

    def end(self) -> None:
        """Writes the trace, if one is going on."""
        if self._here is None:
            return
        here, self._here = self._here, None
        with self._timer.pause(), here:
            try:
                jax.profiler.stop_trace()
                copy_tree(Path(here.name), self._directory)
            except (jax.errors.JaxRuntimeError, OSError) as error:  # a full disk, most likely
                self._log(f"warning: train.profile: the trace could not be written ({str(error).splitlines()[0]})")
            else:
                self._log(f"written: a trace of steps {self._first} to {self._number} in {self._directory}")
