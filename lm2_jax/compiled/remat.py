"""`train.remat: auto`: of a few policies of recomputation, the one with the fastest train step that fits the chip.

Which one that is cannot be told from their names: what is kept has to be written and read, and may cost more than
computing it again. So each is compiled, once: the choice is remembered by program, chip and versions in
~/.cache/lm2_jax/remat.json, and a run keeps its own in config.yaml, since another policy rounds differently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.common.files import write_atomically
from lm2_jax.common.storage import to_path
from lm2_jax.compiled.lowered import Programs
from lm2_jax.compiled.report import compile_program
from lm2_jax.config import Config, replace
from lm2_jax.model.sizes import model_flops
from lm2_jax.parallel.chips import CHIPS, Chip, chip_of
from lm2_jax.tokenizer import with_vocabulary
from lm2_jax.training.run_dir import read_run_config

_POLICIES = ("none", "block", "full")
_LAST_RESORT = "offload"  # where none of them fits
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Tried:
    """The needs of a policy's train step.

    Attributes:
      policy: a value of train.remat.
      peak: bytes of a chip; None if the compiler does not say by how much it is too large.
      step: seconds at best, or None if it does not fit the chip.
    """

    policy: str
    peak: float | None
    step: float | None


def with_remat(config: Config, log: Callable[[str], None]) -> Config:
    """The config with `auto` replaced: by what the run directory has, or by the best policy for this machine's devices.

    On a CPU that is none, since memory has no known limit. Raises UserError on other devices than TPUs, and
    TrainingFailed if nothing fits.
    """
    if config.train.remat != "auto":
        return config
    before = read_run_config(to_path(config.train.run_dir, "train.run_dir"))
    if before is not None:
        return replace(config, train={"remat": before.train.remat})
    device = jax.devices()[0]
    if device.platform == "cpu":
        return replace(config, train={"remat": "none"})
    chip = chip_of(device.device_kind)
    if chip is None:
        known = ", ".join(CHIPS)
        raise UserError(
            f"train.remat: auto knows the memory of {known}; found {device.device_kind}; write none, block or full"
        )
    return replace(config, train={"remat": best_policy(with_vocabulary(config), jax.devices(), chip, log)})


def best_policy(config: Config, devices: Sequence[Any], chip: Chip, log: Callable[[str], None]) -> str:
    """The best policy for a train step, remembered or found by compiling. Raises TrainingFailed if none fits."""
    key = _key(config, devices, chip)
    remembered = _remembered()
    if remembered.get(key) not in (*_POLICIES, _LAST_RESORT):
        tried = try_policies(config, devices, chip, log)
        log(table(tried, chip))
        remembered[key] = choose(tried)
        try:
            _cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_atomically(_cache_file(), json.dumps(remembered, indent=1) + "\n")
        except OSError as error:
            log(f"{_cache_file()} cannot be written ({error.strerror}); another run will compile them again")
    log(f"train.remat: {remembered[key]}")
    return remembered[key]


def try_policies(config: Config, devices: Sequence[Any], chip: Chip, log: Callable[[str], None]) -> list[Tried]:
    """Compiles the train step with every policy; with `offload` only if nothing else fits."""
    tried: list[Tried] = []
    for policy in (*_POLICIES, _LAST_RESORT):
        if policy == _LAST_RESORT and any(other.step is not None for other in tried):
            break
        log(f"compiling the train step with train.remat: {policy} ...")
        programs = Programs(replace(config, train={"remat": policy}), devices)
        lowered, tokens, mesh = programs.lower_train_step()
        flops = model_flops(programs.parameters, tokens, True, programs.frozen) / len(devices)
        _, figures = compile_program(lowered, chip, programs.config, dict(mesh.shape), flops)
        step = figures["roofline"]["step"] if figures["fits"] else None
        tried.append(Tried(policy, figures["peak_bytes"], step))
    return tried


def choose(tried: Sequence[Tried]) -> str:
    """The fastest that fits; the first of several. Raises TrainingFailed if none does."""
    fitting = [one for one in tried if one.step is not None]
    if not fitting:
        raise TrainingFailed(
            f"train.remat: auto found no policy that fits ({', '.join(one.policy for one in tried)} were compiled); "
            "fewer lanes (data.batch_size, optim.accumulation_steps) or shorter windows need less"
        )
    return min(fitting, key=lambda one: one.step).policy


def explain_remat(config: Config, devices: Sequence[Any], chip: Chip, log: Callable[[str], None]) -> str:
    """Compiles every policy anew, and says what each needs and which is best, as lines of text."""
    tried = try_policies(config, devices, chip, log)
    return f"{table(tried, chip)}\n  auto is {choose(tried)}"


def table(tried: Sequence[Tried], chip: Chip) -> str:
    """The policies that were tried, as lines of text."""
    lines = [f"  {'train.remat':<12} {'peak, GiB':>10} {'step at best':>14}"]
    for one in tried:
        peak = "?" if one.peak is None else f"{one.peak / _GIB:.2f}"
        lines.append(f"  {one.policy:<12} {peak:>10} {f'{one.step:.3f} s' if one.step else 'does not fit':>14}")
    return "\n".join([*lines, f"  a chip has {chip.memory / _GIB:.2f} GiB"])


def _key(config: Config, devices: Sequence[Any], chip: Chip) -> str:
    """Names a program that keeps everything, the chip and the versions that compile it."""
    lowered, _, _ = Programs(replace(config, train={"remat": _POLICIES[0]}), devices).lower_train_step()
    return hashlib.sha256(repr((lowered.as_text(), chip, _versions())).encode()).hexdigest()[:32]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def _remembered() -> dict[str, str]:
    try:
        found = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or no longer
        return {}
    return found if isinstance(found, dict) else {}


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm2_jax" / "remat.json"
