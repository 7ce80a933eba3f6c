"""The parameters that a run does not train: saved once, in run_dir/frozen, and checked whenever they are read.

The directory is written as a whole, before the first checkpoint. It holds `params` and `checksums` (JSON), which every
checkpoint of the run repeats, so that parameters of another run are noticed.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orbax.checkpoint as ocp

from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.checkpoint.store import COMPLETE, orbax_path
from lm2_jax.common.errors import UserError, first_line
from lm2_jax.common.storage import AnyPath


def frozen_dir(run_dir: AnyPath) -> AnyPath:
    """The directory of a run's frozen parameters."""
    return run_dir / "frozen"


def save_frozen(run_dir: AnyPath, frozen: Any) -> list[int]:
    """Saves the frozen parameters, unless these very ones are there, and returns their checksums; [] of none."""
    if not frozen:
        return []
    checksums = array_checksums(frozen)
    if not is_saved(run_dir) or _saved_checksums(run_dir) != checksums:
        arrays, text = ocp.args.StandardSave(frozen), ocp.args.JsonSave(checksums)
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
            whole = ocp.args.Composite(params=arrays, checksums=text)
            checkpointer.save(orbax_path(frozen_dir(run_dir)), args=whole, force=True)
    return checksums


def is_saved(run_dir: AnyPath) -> bool:
    """True if a run's frozen parameters are there, whole."""
    return (frozen_dir(run_dir) / COMPLETE).is_file()


def _saved_checksums(run_dir: AnyPath) -> Any:
    return json.loads((frozen_dir(run_dir) / "checksums" / "metadata").read_text(encoding="utf-8"))


def restore_frozen(run_dir: AnyPath, like: Any, checksums: list[int]) -> Any:
    """The frozen parameters, in the types and places of `like`, a tree of shapes with shardings; {} of none.

    Raises UserError if they are damaged, or not those of the checkpoint with these checksums.
    """
    if not like:
        return {}
    directory = frozen_dir(run_dir)
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
            restored = checkpointer.restore(
                orbax_path(directory), args=ocp.args.Composite(params=ocp.args.StandardRestore(like))
            ).params
    except Exception as error:  # whatever Orbax or TensorStore make of damaged files
        raise UserError(f"{directory}: the frozen parameters cannot be read ({first_line(error)}); {_MEND}") from error
    if array_checksums(restored) != checksums:
        raise UserError(f"{directory}: not the frozen parameters that the checkpoint was saved with; {_MEND}")
    return restored


_MEND = "bring the directory back, or start again from train.init_from in another train.run_dir"
