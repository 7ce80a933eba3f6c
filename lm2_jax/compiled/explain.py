"""The table of --explain-sharding: every array of a run, and how it is sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from lm2_jax.compiled.lowered import Programs
from lm2_jax.config import Config
from lm2_jax.parallel.mesh import RULES


def explain_sharding(config: Config, devices: Sequence[Any]) -> str:
    """Axis rules, and every array of a run with its mesh axes and its bytes on one device, as lines of text.

    The devices need not be there. Raises UserError if the mesh does not fit them.
    """
    programs = Programs(config, devices)
    mesh = programs.mesh
    used = [f"{axis} -> {'+'.join(to) if isinstance(to, tuple) else to}" for axis, to in RULES if to]
    lines = [
        f"mesh: {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}, {mesh.size} devices",
        f"axis rules: {', '.join(used)}; all other axes are whole on every device",
        "a block gathers its weights whole along fsdp and context, once for all segments of a window",
    ]
    state = programs.state
    trees = {
        "parameters": state.params,
        "frozen parameters": state.frozen,
        "optimizer": state.opt_state,
        "memory": state.memory,
        "batch": programs.abstract_batch(),
    }
    everything = 0
    for title, tree in trees.items():
        rows = [_row(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
        if not rows:
            continue
        whole, each = sum(row[-2] for row in rows), sum(row[-1] for row in rows)
        everything += each
        lines.append(f"\n{title}: {_size(whole)}, on one device {_size(each)}")
        if title != "optimizer":  # like the parameters, twice
            lines += [
                f"  {name:<44}{shape:<26}{axes:<28}{_size(size):>11}{_size(part):>11}"
                for name, shape, axes, size, part in rows
            ]
    lines.append(f"\non one device {_size(everything)} in all, before activations and gradients")
    return "\n".join(lines)


def _row(path: tuple, array: jax.ShapeDtypeStruct) -> tuple[str, str, str, int, int]:
    name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    item = array.dtype.itemsize
    spec = array.sharding.spec
    axes = ", ".join("+".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in spec)
    part = array.sharding.shard_shape(array.shape)
    return name, str(list(array.shape)), f"[{axes}]", math.prod(array.shape) * item, math.prod(part) * item


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
