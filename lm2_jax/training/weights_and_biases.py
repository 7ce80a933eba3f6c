"""A run on Weights & Biases, or, where it cannot be reached, in files that `wandb sync` uploads later."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid

import wandb

from lm2_jax.common.files import write_atomically
from lm2_jax.common.records import Record, drawable
from lm2_jax.common.storage import AnyPath
from lm2_jax.common.trees import writing_tree
from lm2_jax.config import Config

_LAST_WORDS = 60.0  # seconds that the end of a run waits for an upload; the rest stays in files


class WandbRun:
    """One run of wandb for a run directory, however often it is resumed: wandb/run_id has its id.

    wandb's own environment (WANDB_PROJECT, WANDB_MODE and so on) says where it goes.
    """

    def __init__(self, config: Config, run_dir: AnyPath) -> None:
        self._here = contextlib.ExitStack()
        settings = wandb.Settings(silent=True, console="off", finish_timeout=_LAST_WORDS)
        run = {
            "dir": str(self._here.enter_context(writing_tree(run_dir))),
            "id": _run_id(run_dir),
            "resume": "allow",
            "name": run_dir.name,
            "project": os.environ.get("WANDB_PROJECT", "lm2_jax"),
            "config": config.model_dump(mode="json"),
            "settings": settings,
        }
        try:
            self._run = wandb.init(**run)
        except wandb.errors.Error as error:  # no API key, or no network
            reason, kept = str(error).strip().splitlines()[0], run_dir / "wandb"
            print(f"warning: wandb: {reason} What it is told is kept in {kept}, for `wandb sync`", file=sys.stderr)
            self._run = wandb.init(**run, mode="offline")

    def add(self, record: Record) -> None:
        """Adds the numbers of a record, at its step.

        wandb takes no step below its last, and complains of it. Such steps are those that are done again after a crash,
        with the numbers that it has.
        """
        if record["step"] >= self._run.step:
            self._run.log(drawable(record), step=record["step"])

    def flush(self) -> None:
        """Does nothing: wandb's own process writes."""

    def close(self) -> None:
        """Waits for the last records, for a minute at most."""
        self._run.finish(exit_code=0)
        self._here.close()


def _run_id(run_dir: AnyPath) -> str:
    path = run_dir / "wandb" / "run_id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
