"""Figures of a run's programs, compiled for a topology: memory, work, communication and the roofline."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lm2_jax.common.errors import TrainingFailed
from lm2_jax.compiled import costs, hlo, topology
from lm2_jax.compiled.lowered import Programs
from lm2_jax.compiled.roofline import roofline
from lm2_jax.compiled.where import where
from lm2_jax.config import Config
from lm2_jax.model.sizes import model_flops
from lm2_jax.parallel.chips import Chip
from lm2_jax.tokenizer import with_vocabulary

Figures = dict[str, Any]  # JSON
_GIB = 2**30


def compile_for(
    config: Config,
    topology_name: str,
    slices: int = 1,
    program: str = "both",
    log: Callable[[str], None] = lambda text: None,
    keep: Path | None = None,
    with_places: bool = False,
) -> Figures:
    """Figures of a config's programs on a topology.

    program: train, decode or both. keep: directory for HLO texts. with_places: also where the cycles go.

    Raises UserError if the topology is unknown or the mesh does not fit it.
    """
    warnings = topology.prepare()
    devices, chip = topology.devices_of(topology_name, slices)
    config = with_vocabulary(config)
    programs = Programs(config, devices)
    mesh_shape = dict(programs.mesh.shape)
    log(
        f"{config.memory.kind}: {programs.parameters:,} parameters, {topology_name}"
        f"{f' x {slices} slices' if slices > 1 else ''} ({' x '.join(f'{a} {n}' for a, n in mesh_shape.items())})"
    )
    lowerings = {"train": programs.lower_train_step, "decode": programs.lower_decode_step}
    if not programs.model.kind.is_causal:
        del lowerings["decode"]
    figures = {}
    for name, lower in lowerings.items():
        if program in (name, "both"):
            log(f"compiling the {name} step ...")
            lowered, tokens, mesh = lower()
            flops = model_flops(programs.parameters, tokens, name == "train", programs.frozen) / len(devices)
            text, figures[name] = compile_program(lowered, chip, config, dict(mesh.shape), flops)
            if not figures[name]["fits"]:
                continue
            figures[name] |= {
                "tokens": tokens,
                "mesh": dict(mesh.shape),
                "involuntary_rematerialisations": warnings.involuntary_rematerialisations(),
            }
            if with_places:
                places = where(hlo.parse(text), text, chip)
                figures[name]["where"] = [dataclasses.asdict(place) for place in places]
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name}.hlo").write_text(text)
    return {
        "topology": topology_name,
        "slices": slices,
        "mesh": mesh_shape,
        "parameters": programs.parameters,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "programs": figures,
        "config": config.model_dump(mode="json"),
    }


def compile_program(
    lowered: jax.stages.Lowered, chip: Chip, config: Config, mesh_shape: dict[str, int], flops: float
) -> tuple[str, Figures]:
    """The optimised program as text, and its figures; those of `too_large` if it does not fit the chip."""
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return "", too_large(str(error), chip, config)
    seconds = time.monotonic() - began
    text, memory = compiled.as_text(), compiled.memory_analysis()
    counted = costs.count(hlo.parse(text), mesh_shape)
    return text, {
        "fits": True,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "limit_bytes": chip.memory,
        "model_flops": flops,
        **dataclasses.asdict(counted),
        "wire_bytes": counted.wire_bytes,
        "roofline": dataclasses.asdict(roofline(counted, chip, flops)),
        "compile_seconds": round(seconds, 1),
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
    }


def _amount(value: float) -> str:
    """A number before its unit, such as "1.234 G"; at most four digits."""
    for prefix, size in (
        ("T", 1e12),
        ("G", 1e9),
        ("M", 1e6),
        ("k", 1e3),
        ("", 1.0),
        ("m", 1e-3),
        ("µ", 1e-6),
        ("n", 1e-9),
    ):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.3g} "


def describe(figures: Figures) -> str:
    """A program's figures as lines for people to read."""
    if not figures["fits"]:
        peak, limit = figures["peak_bytes"], figures["limit_bytes"] / _GIB
        over = (
            f"{peak / _GIB:.2f} GiB, {peak / _GIB - limit:.2f} more than available" if peak else "more than available"
        )
        changes = "\n".join(f"  {change}" for change in figures["changes"])
        return f"DOES NOT FIT {limit:.2f} GiB a chip: needs {over}. Try one of\n{changes}"
    roof = figures["roofline"]
    lines = [
        ("tokens a step", f"{figures['tokens']:,}"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())),
        (
            "memory of a chip",
            f"peak {figures['peak_bytes'] / _GIB:.2f} GiB of {figures['limit_bytes'] / _GIB:.2f} "
            f"(arguments {figures['argument_bytes'] / _GIB:.2f}, temporary {figures['temp_bytes'] / _GIB:.2f})",
        ),
        (
            "matrix products",
            f"{_amount(figures['matmul_flops'])}FLOP, {figures['matmul_flops'] / figures['model_flops']:.2f} times the "
            f"model's {_amount(figures['model_flops'])}FLOP; kernels {_amount(figures['kernel_flops'])}FLOP",
        ),
        ("estimated cycles", f"{figures['cycles'] / 1e6:,.4g} M (without {figures['kernel_calls']:,} kernel calls)"),
        ("sent by a chip", f"{_amount(figures['wire_bytes'])}B"),
        *(
            (
                f"  {c['kind']}",
                f"{_amount(c['wire_bytes'])}B over {c['axis']}, {c['count']} times; "
                f"largest {_amount(c['largest_bytes'])}B, in a loop {_amount(c['in_loop_bytes'])}B",
            )
            for c in figures["collectives"]
        ),
        ("main memory traffic", f"{_amount(figures['memory_bytes'])}B; copies {_amount(figures['copy_bytes'])}B"),
        (
            "roofline",
            f"compute {_amount(roof['compute'])}s, memory {_amount(roof['memory'])}s, interconnect "
            f"{_amount(roof['interconnect'])}s, as scheduled {_amount(roof['scheduled'])}s: {roof['binds']} binds",
        ),
        (
            "at best",
            f"{_amount(roof['step'])}s a step, {roof['mfu']:.0%} of peak (6ND, of frozen parameters 4ND; decode 2ND)",
        ),
        ("involuntary rematerialisations", f"{figures['involuntary_rematerialisations']}"),
        ("compiled in", f"{figures['compile_seconds']:.0f} s"),
    ]
    return "\n".join(f"  {name:<32}{text}" for name, text in lines)


def too_large(message: str, chip: Chip, config: Config) -> Figures:
    """Figures from the compile error of a program that does not fit. Raises TrainingFailed for any other error."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        raise TrainingFailed(f"libtpu cannot compile the program: {message.splitlines()[0][:400]}")
    used = re.search(r"(?:Used |\()([\d.]+)([MG])(?: of|\) exceeds)", message)  # all, or temporary arrays alone
    peak = float(used.group(1)) * (2**30 if used.group(2) == "G" else 2**20) if used else None
    return {"fits": False, "peak_bytes": peak, "limit_bytes": chip.memory, "changes": changes(config)}


def changes(config: Config) -> list[str]:
    """Settings that would make a train step smaller, the mildest first."""
    found = []
    better = {"none": "block", "block": "full"}.get(config.train.remat)
    if better is not None:
        found.append(f"--set train.remat={better} (now {config.train.remat}): recompute instead of keeping")
    if config.train.dtype == "float32":
        found.append("--set train.dtype=bfloat16 (now float32): activations half as large")
    lanes = config.data.batch_size // config.optim.accumulation_steps
    if lanes % 2 == 0:
        found.append(
            f"--set optim.accumulation_steps={config.optim.accumulation_steps * 2}: half as many lanes at once"
        )
        found.append(f"--set data.batch_size={config.data.batch_size // 2}: fewer lanes")
    if config.data.segments_per_window > 1:
        found.append(f"--set data.segments_per_window={config.data.segments_per_window // 2}: shorter windows")
    found.append("a topology with more chips, with mesh.fsdp=-1: parameters and optimizer state in smaller parts")
    return found
