"""Checks a run directory without changing it: `python -m lm2_jax.train --verify RUN_DIR`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import jax

from lm2_jax.checkpoint.manager import Checkpoints, DamagedError
from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.common.journal import Journal
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import replace
from lm2_jax.model import build_model
from lm2_jax.parallel.mesh import make_mesh, use_mesh
from lm2_jax.training.run_dir import read_run_config
from lm2_jax.training.state import StepConfig, abstract_state, shardings_of


@dataclasses.dataclass(frozen=True)
class Finding:
    """The state of one part of a run directory; `problem` is empty where it is sound."""

    part: str
    problem: str
    detail: str = ""


def verify(run_dir: AnyPath) -> None:
    """Prints what is sound in a run directory and what is not. Raises TrainingFailed if anything is not."""
    unsound = 0
    for finding in verify_run(run_dir):
        print(f"{finding.part}: {finding.problem or f'sound ({finding.detail})'}", flush=True)
        unsound += bool(finding.problem)
    if unsound:
        raise TrainingFailed(f"{run_dir}: {unsound} part(s) unsound")


def verify_run(run_dir: AnyPath) -> Iterator[Finding]:
    """Findings on config.yaml, every checkpoint (newest first), metrics.jsonl and summary.json.

    Every array of a checkpoint is read and compared with its checksum. Raises UserError if it is not a run directory.
    """
    config = read_run_config(run_dir)
    if config is None:
        raise UserError(f"{run_dir}: not a run directory (no config.yaml)")
    yield Finding("config.yaml", "", f"{config.memory.kind}, {config.train.steps} steps")

    config = replace(config, mesh={"data": 1, "fsdp": 1, "context": 1, "tensor": 1})
    mesh = make_mesh(config, jax.devices()[:1])
    newest = 0
    with use_mesh(mesh), contextlib.closing(Checkpoints(run_dir, config.checkpoint, read_only=True)) as checkpoints:
        run = build_model(config), mesh, StepConfig.of(config)
        state, shardings = abstract_state(*run), shardings_of(*run)
        for step in checkpoints.steps():
            try:
                _, progress = checkpoints.restore(step, state, shardings)
            except DamagedError as error:
                yield Finding(f"checkpoints/{step}", f"damaged: {error}")
            else:
                newest = max(newest, step)
                yield Finding(f"checkpoints/{step}", "", f"intact, {progress['tokens']:,} tokens read")
    if not newest:
        yield Finding("checkpoints", "no intact checkpoint: the run would start afresh")
    yield _metrics(run_dir, newest)
    if (run_dir / "summary.json").exists():
        yield _summary(run_dir)


def _metrics(run_dir: AnyPath, newest: int) -> Finding:
    """Checks that no step is missing up to the newest checkpoint, to which a resumed run cuts its metrics back."""
    part = "metrics.jsonl"
    try:
        lines = Journal(run_dir / part).read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return Finding(part, f"cannot be read ({error})")
    step = 0
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # cut short by a kill; it is left out on resuming
                break
            return Finding(part, f"line {number} is no record: {line[:60]!r}")
        if found != step + 1:
            return Finding(part, f"line {number} is of step {found}; expected {step + 1}")
        step = found
    if step < newest:
        return Finding(part, f"ends at step {step}, before the newest checkpoint ({newest})")
    return Finding(part, "", f"steps 1 to {step}")


def _summary(run_dir: AnyPath) -> Finding:
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return Finding("summary.json", "", f"complete, step {summary['step']}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        return Finding("summary.json", f"cannot be read ({error})")
