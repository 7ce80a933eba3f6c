"""TPUs that are not there: libtpu compiles for the chips of a topology on any machine."""

from __future__ import annotations

import atexit
import importlib.util
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from lm2_jax.common.errors import UserError
from lm2_jax.common.jax_stack import libtpu_of_jax
from lm2_jax.parallel.chips import CHIPS, Chip

_QUIET = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "1",  # warnings, to files alone
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Warnings:
    """Warnings that libtpu writes to its log from now on."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._seen = directory, 0
        self.involuntary_rematerialisations()  # those of programs that were compiled before

    def involuntary_rematerialisations(self) -> int:
        """Arrays, since the last call, that the partitioner could only move by making them whole on every chip."""
        texts = [path.read_text(errors="replace") for path in self._directory.glob("*.log.WARNING.*")]
        found = sum(text.count("Involuntary full rematerialization") for text in texts)
        new, self._seen = found - self._seen, found
        return new


def prepare() -> Warnings:
    """Sets up libtpu, before it is loaded; JAX itself stays on the CPU."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    if "TPU_LOG_DIR" not in os.environ:
        os.environ["TPU_LOG_DIR"] = tempfile.mkdtemp(prefix="lm2_jax_libtpu_")
        atexit.register(shutil.rmtree, os.environ["TPU_LOG_DIR"], ignore_errors=True)
    return Warnings(Path(os.environ["TPU_LOG_DIR"]))


def devices_of(topology: str, slices: int = 1) -> tuple[Sequence[Any], Chip]:
    """The devices of "v5e:4x4" and the like, of several slices joined by the data-centre network, and their chip.

    Raises UserError if there is no such topology, or no libtpu.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise UserError(
            f"--topology: found {topology}; write one of {', '.join(CHIPS)}, a colon and chips, as in v5e:4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"libtpu is missing; it compiles for TPUs on any Linux machine: pip install 'libtpu{libtpu_of_jax()}'"
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(int(n) for n in re.findall(r"\d+", topology.partition(":")[2])) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices, CHIPS[generation]
    except Exception as error:  # whatever libtpu makes of a name
        message = str(error).strip().splitlines()[0][:200]
        raise UserError(f"--topology: libtpu knows no {topology} of {slices} slice(s) ({message})") from None
