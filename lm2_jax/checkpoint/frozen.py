"""The parameters that a run does not train: saved once, in run_dir/frozen, and checked whenever they are read.

The directory is written as a whole, before the first checkpoint. It holds `params` and `checksums` (JSON), which every
checkpoint of the run repeats, so that parameters of another run are noticed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.common.errors import UserError, first_line


def frozen_dir(run_dir: Path) -> Path:
    """The directory of a run's frozen parameters."""
    return run_dir / "frozen"


def save_frozen(run_dir: Path, frozen: Any) -> list[int]:
    """Saves the frozen parameters, unless they are there already, and returns their checksums; [] of none."""
    if not frozen:
        return []
    checksums = array_checksums(frozen)
    if not frozen_dir(run_dir).exists():
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
            arrays, text = ocp.args.StandardSave(frozen), ocp.args.JsonSave(checksums)
            checkpointer.save(frozen_dir(run_dir).absolute(), args=ocp.args.Composite(params=arrays, checksums=text))
    return checksums


def restore_frozen(run_dir: Path, like: Any, checksums: list[int]) -> Any:
    """The frozen parameters, in the types and places of `like`, a tree of shapes with shardings; {} of none.

    Raises UserError if they are damaged, or not those of the checkpoint with these checksums.
    """
    if not like:
        return {}
    directory = frozen_dir(run_dir).absolute()
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
            restored = checkpointer.restore(
                directory, args=ocp.args.Composite(params=ocp.args.StandardRestore(like))
            ).params
    except Exception as error:  # whatever Orbax or TensorStore make of damaged files
        raise UserError(f"{directory}: the frozen parameters cannot be read ({first_line(error)}); {_MEND}") from error
    if array_checksums(restored) != checksums:
        raise UserError(f"{directory}: not the frozen parameters that the checkpoint was saved with; {_MEND}")
    return restored


_MEND = "bring the directory back, or start again from train.init_from in another train.run_dir"
