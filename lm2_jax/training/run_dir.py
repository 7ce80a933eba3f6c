"""The run directory: which config may train in it, and the end of a run in files.

A run directory holds config.yaml (complete), started.json (when it was first started), metrics.jsonl (one object a
step), checkpoints/, tensorboard/, origin/ (the small files of a pretrained model that it began with), and at the end
summary.json and training.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import lock_directory, write_atomically
from lm2_jax.common.journal import Journal
from lm2_jax.common.records import Record, read_records
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.config import Config, dump_config, load_config
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.loading import differences
from lm2_jax.parallel.processes import is_first
from lm2_jax.plots.runs import Run, plot_runs
from lm2_jax.tokenizer import Origin, origin_beside, origin_in, origin_of_model
from lm2_jax.training.curriculum import Progress
from lm2_jax.training.trackers import check_trackers

# Keys that may differ between a run directory and the command that resumes it: none of them changes what is learnt,
# but for train.steps, which moves the learning rate's decay.
_MAY_CHANGE = (
    "train.run_dir", "train.steps", "train.max_skipped_steps", "train.trackers", "train.profile", "data.prefetch",
    "data.cache_gb", "checkpoint", "eval", "mesh",
)  # fmt: skip


def open_run_dir(config: Config, origin: Origin | None) -> AnyPath:
    """Creates the run directory, its config.yaml and its origin/.

    Raises UserError if it belongs to a run of another config, or if a tracker's package is missing.
    """
    check_trackers(config)
    run_dir = to_path(config.train.run_dir, "train.run_dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.run_dir: {run_dir} cannot be created ({error.strerror})") from None
    before = read_run_config(run_dir)
    if before is not None:
        changed = [
            f"  {key}: {old!r} in the run directory, {new!r} now"
            for key, old, new in differences(before.model_dump(), config.model_dump())
            if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in _MAY_CHANGE)
        ]
        if changed:
            raise UserError(
                f"{run_dir} holds a run of another config; give this one another train.run_dir, or undo:\n"
                + "\n".join(changed)
                + f"\nWhat may change between runs: {', '.join(_MAY_CHANGE)}"
            )
    try:
        if is_first():
            write_atomically(run_dir / "config.yaml", dump_config(config))
            if not (run_dir / "started.json").exists():
                write_atomically(run_dir / "started.json", json.dumps({"time": time.time()}) + "\n")
            if origin is not None:
                origin.copy_to(run_dir)
    except OSError as error:
        raise UserError(f"train.run_dir: {run_dir} cannot be written to ({error.strerror})") from None
    return run_dir


def time_so_far(run_dir: AnyPath) -> tuple[float, float | None]:
    """The run's first start, in seconds since the epoch, and the seconds in the steps of its metrics.jsonl.

    The latter is None where it is not known: in processes that do not report, and for steps of an earlier version.
    Raises UserError if the file with the first start is damaged.
    """
    if not is_first():
        return time.time(), None
    path = run_dir / "started.json"
    try:
        started = float(json.loads(path.read_text(encoding="utf-8"))["time"])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: holds no time; remove it, and goodput counts from the next start on") from None
    metrics = run_dir / "metrics.jsonl"
    records = read_records(metrics) if Journal(metrics).exists() else []
    seconds = [record.get("step_seconds") for record in records]
    return started, None if None in seconds else sum(seconds)


def origin_of_run(config: Config) -> Origin | None:
    """The small files of the model that a run began with: its own, those of train.init_from, or the tokenizer's."""
    run_dir, weights = to_path(config.train.run_dir, "train.run_dir"), config.train.init_from
    return (
        origin_in(run_dir)
        or (origin_of_model(config.tokenizer, weights) if weights else None)
        or origin_beside(config.tokenizer.path)
    )


def claim(run_dir: AnyPath) -> contextlib.AbstractContextManager[None]:
    """Locks the run directory for this run. Raises UserError, on entering, if another process trains in it."""
    taken = f"{run_dir}: another process trains in it; wait, or give another train.run_dir"
    return lock_directory(run_dir, taken) if is_first() else contextlib.nullcontext()


def read_run_config(run_dir: AnyPath) -> Config | None:
    """The config that a run directory was started with; None if it holds none."""
    path = run_dir / "config.yaml"
    return load_config(path) if path.exists() else None


def check_data(progress: Progress, pipeline: Pipeline, run_dir: AnyPath) -> Progress:
    """The progress with the fingerprint of the data.

    Raises UserError if files or tokenizer are not those that a resumed data position refers to. Of a run that an
    earlier version saved, the sizes of its files must be the same.
    """
    fingerprint = pipeline.fingerprint()
    if progress.step and progress.data_fingerprint not in (fingerprint, pipeline.fingerprint_by_size()):
        raise UserError(
            f"{run_dir}: the tokenizer or the files in data.path, data.validation_path or data.background have changed "
            "since its checkpoint; restore them, or start another train.run_dir"
        )
    return dataclasses.replace(progress, data_fingerprint=fingerprint)


def write_summary(run_dir: AnyPath, summary: dict[str, Any], records: Sequence[Record]) -> list[AnyPath]:
    """Writes summary.json and, if any loss was finite, training.png; returns the files written."""
    written = [run_dir / "summary.json"]
    write_atomically(written[0], json.dumps(summary, indent=1) + "\n")
    try:
        run = Run(run_dir.name, records, summary["accuracy_by_length"])
        plot_runs(run_dir / "training.png", [run], ("loss", "answers", "length"))
    except UserError:  # no loss was finite
        return written
    return [*written, run_dir / "training.png"]
