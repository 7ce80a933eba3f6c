"""Position of a run in its steps and its data, and the stages of its curriculum."""

from __future__ import annotations

import dataclasses
from typing import Any

import grain

from lm2_jax.batch import Batch
from lm2_jax.config import Config, StageConfig
from lm2_jax.data.lanes import make_iterator
from lm2_jax.data.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Progress:
    """Position of a run: frozen, saved with every checkpoint, and what a resumed run starts from.

    Attributes:
      step: steps done.
      stage, stage_start: index of the curriculum's stage, and the step after which it began.
      tokens: predicted so far.
      correct, answers: since the last log, in this stage: right answers, and all.
      data_fingerprint: of the tokenizer and the files; see `Pipeline.fingerprint`.
      data: state of the iterator of windows; None before the first step.
    """

    step: int = 0
    stage: int = 0
    stage_start: int = 0
    tokens: int = 0
    correct: int = 0
    answers: int = 0
    data_fingerprint: str = ""
    data: dict[str, Any] | None = None

    def after_step(self, data: dict[str, Any]) -> Progress:
        """The progress one step later; `data`: the iterator's state."""
        return dataclasses.replace(self, step=self.step + 1, data=data)

    def counted(self, tokens: int, correct: int, answers: int) -> Progress:
        """The progress with what some steps predicted added to its counts."""
        return dataclasses.replace(
            self, tokens=self.tokens + tokens, correct=self.correct + correct, answers=self.answers + answers
        )

    def without_answers(self) -> Progress:
        """The progress with its count of answers started afresh."""
        return dataclasses.replace(self, correct=0, answers=0)

    def next_stage(self) -> Progress:
        """The progress at the start of the next stage, whose answers are counted afresh."""
        return dataclasses.replace(self.without_answers(), stage=self.stage + 1, stage_start=self.step)


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
