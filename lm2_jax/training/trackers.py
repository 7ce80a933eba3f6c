"""The trackers of train.trackers, which take the numbers of a run beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

from lm2_jax.common.errors import UserError
from lm2_jax.common.records import Record
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import Config


class Tracker(Protocol):
    """Takes the records of metrics.jsonl."""

    def add(self, record: Record) -> None:
        """Adds the numbers of a record, at its step."""

    def flush(self) -> Any:
        """Writes what was added."""

    def close(self) -> Any:
        """Ends the tracking."""


def check_trackers(config: Config) -> None:
    """Raises UserError if the package of a tracker is missing."""
    if "wandb" in config.train.trackers and importlib.util.find_spec("wandb") is None:
        raise UserError("train.trackers: found wandb, whose package is missing; pip install wandb, or leave it out")


def open_trackers(config: Config, run_dir: AnyPath, first_step: int) -> list[Tracker]:
    """The trackers of a run that begins, or goes on, with `first_step`."""
    trackers: list[Tracker] = []
    if "tensorboard" in config.train.trackers:
        from lm2_jax.training.tensorboard import Board  # imports torch, where there is one, which takes seconds

        trackers.append(Board(run_dir / "tensorboard", first_step))
    if "wandb" in config.train.trackers:
        from lm2_jax.training.weights_and_biases import WandbRun  # an extra

        trackers.append(WandbRun(config, run_dir))
    return trackers
