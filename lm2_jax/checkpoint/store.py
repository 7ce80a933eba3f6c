"""Checkpoints in a directory of either kind: which are complete, and what Orbax needs for those of an object store.

In a store nothing can be renamed: a checkpoint grows under its own name, and is complete once it has a
`commit_success.txt`, which Orbax writes last. Orbax leaves an incomplete one that is not the newest where it is. When
it removes an old one, it asks for the settings of the bucket (has it folders?), and fails if the account may not see
them, as one that may only read and write objects does.
"""

from __future__ import annotations

import os
from pathlib import Path

from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils  # TensorStore's settings have no public name

from lm2_jax.common.storage import AnyPath, StorePath
from lm2_jax.common.trees import remove_tree

COMPLETE = "commit_success.txt"
_RETRIES = {"max_retries": 8, "initial_delay": "1s", "max_delay": "32s"}  # two minutes; 32 tries as it comes


def orbax_path(path: AnyPath) -> os.PathLike:
    """A path for Orbax. TensorStore will try again for two minutes what fails because of the network."""
    if isinstance(path, Path):
        return path
    _ = path.filesystem  # made, so that Orbax gets the same one
    for settings in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
        settings["gcs_request_retries"] = _RETRIES
    gcs_utils.is_hierarchical_namespace_enabled = _has_folders
    return epath.Path(str(path))


_ask_for_folders = gcs_utils.is_hierarchical_namespace_enabled


def _has_folders(path: os.PathLike) -> bool:
    try:
        return _ask_for_folders(path)
    except Exception:  # no permission, or no login that Google's own client finds
        return False


def complete_steps(checkpoints: AnyPath) -> list[int]:
    """The steps of the complete checkpoints in a run's directory of them, newest first. Raises OSError as a file."""
    steps = [path for path in checkpoints.glob("*") if path.name.isdecimal()]
    if isinstance(checkpoints, StorePath):
        steps = [path for path in steps if (path / COMPLETE).is_file()]
    return sorted((int(path.name) for path in steps), reverse=True)


def remove_incomplete(checkpoints: StorePath) -> None:
    """Removes what interrupted saves have left in a store."""
    complete = set(complete_steps(checkpoints))
    for path in list(checkpoints.glob("*")):
        if path.name.isdecimal() and int(path.name) not in complete:
            remove_tree(path)
