"""Where a run stands: frozen, saved with every checkpoint, and what a resumed run starts from."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Progress:
    """Position of a run in its steps, its curriculum and its data.

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
