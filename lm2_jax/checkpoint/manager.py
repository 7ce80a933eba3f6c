"""Checkpoints: Orbax, asynchronous and atomic, verified when they are read.

A checkpoint is a directory named by its step, with four items: `params`, `training` (optimizer state, memory, counts),
`progress` (JSON: data position, curriculum and counts) and `config` (JSON: the run's whole config). `progress` holds
checksums of every array and of itself, so that a damaged checkpoint is recognised and the one before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.checkpoint.frozen import restore_frozen, save_frozen
from lm2_jax.checkpoint.store import orbax_path, remove_incomplete
from lm2_jax.common.errors import TrainingFailed, UserError, first_line
from lm2_jax.common.storage import AnyPath, StorePath
from lm2_jax.common.trees import move_tree
from lm2_jax.config import CheckpointConfig, Config
from lm2_jax.parallel.processes import for_all, is_first, wait_for_all

Progress = Mapping[str, Any]  # JSON
State = Any  # a dataclass of arrays: `params` holds what is trained, `frozen` the other parameters


class DamagedError(Exception):
    """A checkpoint that cannot be read, or whose arrays are not the ones that were saved."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: AnyPath, config: CheckpointConfig, read_only: bool = False) -> None:
        """Opens run_dir/checkpoints, creating it if needed, and removes what an interrupted save left behind.

        read_only: creates and removes nothing. Raises UserError if the directory cannot be created.
        """
        for noisy in ("absl", "asyncio"):  # Orbax reports every save, and an error many times over
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        self.directory = (run_dir / "checkpoints").absolute()
        self._config = config
        self._read_only = read_only
        self._frozen_checksums: list[int] | None = None  # of this run, once they are saved or restored
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(self._config.keep),
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),  # the training loop decides when
            cleanup_tmp_directories=not self._read_only,
            enable_async_checkpointing=True,
            read_only=self._read_only,
        )
        if not self._read_only:
            try:
                self.directory.mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.directory} is no directory to save checkpoints in ({error.strerror})") from None
            if isinstance(self.directory, StorePath):
                if is_first():
                    remove_incomplete(self.directory)
                wait_for_all(f"complete checkpoints of {self.directory}")
        return ocp.CheckpointManager(orbax_path(self.directory), options=options)

    def save(self, state: State, progress: Progress, config: Config) -> None:
        """Starts to save; returns once the arrays are copied. The checkpoint appears under its step when complete.

        Raises TrainingFailed if this save or the one before it could not be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        params, training = _split(state)
        checksums = _checksums(params, training, progress)
        with self._writing():
            unsaved = (params, training, state.frozen if self._frozen_checksums is None else {})
            self._check_space(2**20 + sum(leaf.nbytes for leaf in jax.tree.leaves(unsaved)))
            if self._frozen_checksums is None:
                self._frozen_checksums = save_frozen(self.directory.parent, state.frozen)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    training=ocp.args.StandardSave(training),
                    progress=ocp.args.JsonSave({**progress, "checksums": checksums, "frozen": self._frozen_checksums}),
                    config=ocp.args.JsonSave(config.model_dump(mode="json")),
                ),
            )

    def _check_space(self, needed: int) -> None:
        if isinstance(self.directory, StorePath):
            return
        free = shutil.disk_usage(self.directory).free
        if free < needed:  # Orbax would notice late, with a long traceback
            raise OSError(errno.ENOSPC, f"it needs {needed:,} bytes, the disk has {free:,} left")

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore_latest(self, like: State, shardings: State) -> tuple[State, dict[str, Any]] | None:
        """The newest intact checkpoint, placed by `shardings`; None if there is no checkpoint at all.

        Damaged ones are named on standard error and moved aside, to `damaged_checkpoints/`.
        Raises UserError if every checkpoint is damaged.
        """
        steps = self.steps()
        for step in steps:
            restored, problem = None, ""
            try:
                restored = self.restore(step, like, shardings)
            except DamagedError as error:
                problem = f" ({error})"
            if for_all(restored is not None):
                return restored
            aside = self._move_aside(step)
            print(f"warning: checkpoint {step} is damaged{problem}; moved to {aside}", file=sys.stderr)
        if steps:
            raise UserError(
                f"{self.directory}: all {len(steps)} checkpoints were damaged and moved aside; "
                "start again in another train.run_dir, or run once more to start this one afresh"
            )
        return None

    def wait(self) -> None:
        """Waits until every save is on disk. Raises TrainingFailed if one could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the saves and ends Orbax's threads. Raises TrainingFailed as `wait` does."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the devices or of another process, not of the disk
            raise
        except Exception as error:  # whatever Orbax or TensorStore make of a full or failing disk
            left = f"the newest intact one is {max(self.steps())}" if self.steps() else "there is none yet"
            raise TrainingFailed(
                f"{self.directory}: a checkpoint could not be saved ({first_line(error)}); {left}. When the "
                f"{'store can be reached' if isinstance(self.directory, StorePath) else 'disk can be written to'} "
                "again, the same command resumes"
            ) from error

    def restore(self, step: int, like: State, shardings: State) -> tuple[State, dict[str, Any]]:
        """One checkpoint, placed by `shardings`. Raises DamagedError if it is not what was saved."""

        def target(x: jax.Array, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        targets = jax.tree.map(target, like, shardings)
        params, training = _split(targets)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    training=ocp.args.StandardRestore(training),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            saved, frozen_checksums = restored.progress.pop("checksums"), restored.progress.pop("frozen", [])
        except Exception as error:  # whatever Orbax, TensorStore or JSON make of damaged files
            if _lacks_resources(error):
                raise
            raise DamagedError(first_line(error)) from error
        found = _checksums(restored.params, restored.training, restored.progress)
        if found != saved:
            raise DamagedError("its contents fail their checksums")
        frozen = restore_frozen(self.directory.parent, targets.frozen, frozen_checksums)
        self._frozen_checksums = frozen_checksums
        return like.replace(params=restored.params, frozen=frozen, **restored.training), restored.progress

    def _move_aside(self, step: int) -> AnyPath:
        self._manager.close()
        aside = self.directory.parent / "damaged_checkpoints"
        aside.mkdir(exist_ok=True)
        number = 0
        while (target := aside / f"{step}{f'.{number}' if number else ''}").exists():
            number += 1
        wait_for_all(f"name for {step}")
        if is_first():
            move_tree(self.directory / str(step), target)
        wait_for_all(f"moved {step}")
        self._manager = self._open()
        return target


def _split(state: State) -> tuple[Any, dict[str, Any]]:
    own = {"params", "frozen"}  # saved apart
    training = {name: getattr(state, name) for name in state.__dataclass_fields__ if name not in own}
    return state.params, training


def _checksums(params: Any, training: Any, progress: Progress) -> list[int]:
    """Checksums of every array, parameters first, then a CRC-32 of `progress`."""
    text = json.dumps(progress, sort_keys=True)
    return [*array_checksums((params, training)), zlib.crc32(text.encode())]


def _lacks_resources(error: Exception) -> bool:
    """True if an error is about this process or machine, and says nothing about a file's contents."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES):
        return True
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
