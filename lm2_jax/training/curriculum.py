"""The stages of a run: which windows it reads, and when the next stage begins."""

from __future__ import annotations

import grain

from lm2_jax.batch import Batch
from lm2_jax.config import Config, StageConfig
from lm2_jax.data.lanes import make_iterator
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.training.progress import Progress


class Curriculum:
    """Keeps the iterator of the windows of the stage that a run is in."""

    def __init__(self, config: Config, pipeline: Pipeline) -> None:
        self._stages, self._prefetch, self._pipeline = config.stages, config.data.prefetch, pipeline
        self._windows: grain.DatasetIterator[Batch] | None = None

    def windows(self, progress: Progress) -> tuple[StageConfig, grain.DatasetIterator[Batch]]:
        """The stage, and its windows from the data position of `progress` on."""
        stage = self._stages[progress.stage]
        if self._windows is None:  # a new stage, or a resumed one
            self._windows = make_iterator(self._pipeline.training(stage), self._prefetch)
            if progress.data is not None:
                self._windows.set_state(progress.data)
        return stage, self._windows

    def stage_is_over(self, progress: Progress, logged: bool) -> bool:
        """True once the stage's step budget is spent, or, when just logged, once accuracy reaches advance_accuracy."""
        if progress.stage + 1 == len(self._stages):
            return False
        stage, done = self._stages[progress.stage], progress.step - progress.stage_start
        if stage.steps is not None and done >= stage.steps:
            return True
        wanted = stage.advance_accuracy
        return bool(
            logged and wanted is not None and progress.answers and progress.correct / progress.answers >= wanted
        )

    def advance(self, progress: Progress) -> Progress:
        """Closes the stage's windows; returns the progress at the start of the next stage."""
        self.close()
        return progress.next_stage()

    def close(self) -> None:
        """Ends the thread that reads ahead; it would outlive an error."""
        if self._windows is not None:
            self._windows.close()
        self._windows = None
