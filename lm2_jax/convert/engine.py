"""Applies the tables: reads a foreign state dict as our parameters, and writes ours as theirs.

Parameters are `Tensor`s by path ("bank_blocks/attention/query"), read when they are needed: from any source, to any
destination, one block's at a time. Everything that does not fit is found and named before a byte is written.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from lm2_jax.common.errors import UserError
from lm2_jax.config import Config
from lm2_jax.convert.tables import Rule, Table
from lm2_jax.convert.tensors import Tensor
from lm2_jax.model import build_model
from lm2_jax.model.decoder import STACKS
from lm2_jax.model.lora import A, B, LowRank, is_addition, without
from lm2_jax.tokenizer import Origin

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
Track = Callable[[Iterable, str], Iterable]  # passes items on and shows progress; takes them and a title


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model from any source.

    Attributes:
      config: its model, memory, segments and tokenizer; other sections are defaults.
      params: by path.
      memory: the start memory that it carries (official: [B,N,N]); None: the usual one.
      origin: the small files that came with the weights (settings that we have no place for, generation settings,
        chat templates), to be written again where they belong.
      trained: `step` and `tokens` of the run that it comes from; None where they are not known.
    """

    config: Config
    params: Mapping[str, Tensor]
    memory: np.ndarray | None = None
    origin: Origin | None = None
    trained: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One foreign tensor.

    Attributes:
      path: path of our parameter.
      row: its row in our layer axis; None: all of it.
      name, aliases: foreign names.
      shape: foreign shape.
      transposed: the foreign tensor is [out, in].
    """

    path: str
    row: int | None
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool


def abstract_params(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters of a config, by path; nothing is allocated, as a config may ask for any size."""
    return flatten_dict(build_model(config).abstract_params(), sep="/")


def table_key(path: str) -> str:
    """Key of a parameter in a table: its path, within the block if it is in one."""
    stack, _, within = path.partition("/")
    return within if stack in STACKS else path


def entries(table: Table, shapes: Mapping[str, Any], config: Config) -> list[Entry]:
    """The foreign tensors of parameters of these shapes. Raises UserError where the layout has no place for one."""
    stacks = build_model(config).stacks
    first = dict(zip(stacks, itertools.accumulate(stacks.values(), initial=0), strict=False))
    unplaced = sorted(path for path in shapes if table_key(path) not in table.rules)
    if unplaced:
        raise UserError("the layout asked for has no place for " + ", ".join(unplaced))
    found = []
    for path, leaf in shapes.items():
        rule = table.rules[table_key(path)]
        if table_key(path) == path:
            found.append(_entry(rule, path, None, None, leaf.shape))
            continue
        below = first[path.partition("/")[0]]
        found += [_entry(rule, path, row, below + row, leaf.shape[1:]) for row in range(leaf.shape[0])]
    return found


def _entry(rule: Rule, path: str, row: int | None, layer: int | None, shape: tuple[int, ...]) -> Entry:
    name, *aliases = (text.format(layer=layer) for text in (rule.name, *rule.aliases))
    return Entry(path, row, name, tuple(aliases), shape[::-1] if rule.transposed else shape, rule.transposed)


def check_names(wanted: Iterable[Entry], tensors: Mapping[str, Tensor], table: Table, where: Path) -> None:
    """Raises UserError with every tensor that is missing, unknown, of another shape, or not floating-point."""
    problems, known = [], set()
    for entry in wanted:
        known |= {entry.name, *entry.aliases}
        for name in (entry.name, *entry.aliases):
            tensor = tensors.get(name)
            if tensor is None:
                if name == entry.name or table.aliases_required:
                    problems.append(f"{name}: is missing; expected {list(entry.shape)}")
                continue
            if tensor.shape != entry.shape:
                transposed = " (transposed?)" if tensor.shape == entry.shape[::-1] else ""
                problems.append(f"{name}: found {list(tensor.shape)}; expected {list(entry.shape)}{transposed}")
            if not tensor.is_float:
                problems.append(f"{name}: found {tensor.dtype}; expected F32, F16 or BF16")
    problems += [f"{name}: is not a tensor of this model" for name in tensors if name not in known]
    if problems:
        raise UserError(f"{where}: {len(problems)} problem(s) with its tensors:\n" + _listed(problems))


def check_values(wanted: Iterable[Entry], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises UserError listing every tensor with non-finite values, and every alias that differs from its tensor."""
    problems = []
    for entry in wanted:
        array = tensors[entry.name].read()
        if not np.all(np.isfinite(array)):
            problems.append(f"{entry.name}: holds NaN or infinite numbers")
        for alias in entry.aliases:
            if alias in tensors and not np.array_equal(array, tensors[alias].read(), equal_nan=True):
                problems.append(f"{alias}: differs from {entry.name}, but both are the same tensor")
    if problems:
        raise UserError(f"{where}: {len(problems)} problem(s) with its values:\n" + _listed(problems))


def read_as_ours(
    table: Table,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Any],
    config: Config,
    bank: Sequence[Entry],
    where: Path,
    track: Track,
) -> dict[str, Tensor]:
    """Our parameters, float32, each read from the foreign tensors it is made of.

    bank: the start memory beside the parameters, which is checked with them. Raises UserError with everything that
    does not fit.
    """
    sources: dict[str, list[Entry]] = {}
    for entry in (wanted := entries(table, shapes, config)):
        sources.setdefault(entry.path, []).append(entry)
    check_names([*bank, *wanted], tensors, table, where)
    check_values(track([*bank, *wanted], "checking"), tensors, where)

    def one(entry: Entry) -> np.ndarray:
        array = tensors[entry.name].read().astype(np.float32, copy=False)
        return array.T if entry.transposed else array

    def reader(path: str) -> Callable[..., np.ndarray]:
        def read(row: int | None = None) -> np.ndarray:
            here = sources[path]
            if here[0].row is None:
                return one(here[0])
            return np.stack([one(entry) for entry in here]) if row is None else one(here[row])

        return read

    return {
        path: Tensor(tensors[own[0].name].file, shapes[path].shape, "F32", reader(path))
        for path, own in sources.items()
    }


def as_theirs(table: Table, checkpoint: Checkpoint, dtype: str, track: Track) -> Iterator[tuple[str, np.ndarray]]:
    """Yields foreign names and arrays, one by one, in the order of their blocks."""
    wanted = entries(table, checkpoint.params, checkpoint.config)
    for entry in track(sorted(wanted, key=_in_reading_order), "writing"):
        array = _read_as_theirs(checkpoint, entry).astype(DTYPES[dtype])
        yield entry.name, array
        if table.aliases_required:
            yield from ((alias, array) for alias in entry.aliases)


def their_tensors(table: Table, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint as foreign tensors by name, each made when it is read."""

    def tensor(entry: Entry) -> Tensor:
        file = checkpoint.params[entry.path].file
        return Tensor(file, entry.shape, "F32", lambda: _read_as_theirs(checkpoint, entry))

    return {entry.name: tensor(entry) for entry in entries(table, checkpoint.params, checkpoint.config)}


def _read_as_theirs(checkpoint: Checkpoint, entry: Entry) -> np.ndarray:
    array = checkpoint.params[entry.path].read(entry.row)
    return array.T if entry.transposed else array


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """The same model without low-rank additions: each is added to its weight when that is read."""
    params, lora = checkpoint.params, checkpoint.config.model.lora
    if lora is None:
        return checkpoint

    def whole(path: str, weight: Tensor) -> Tensor:
        if path + A not in params:
            return weight
        parts = weight, params[path + A], params[path + B]
        scale = lora.alpha / lora.rank
        return weight._replace(read=lambda *row: LowRank(*(part.read(*row) for part in parts), scale).merged())

    weights = {path: whole(path, tensor) for path, tensor in params.items() if not is_addition(path)}
    return dataclasses.replace(checkpoint, config=without(checkpoint.config), params=weights)


def carried(checkpoint: Checkpoint, keys: Iterable[str]) -> dict[str, Any]:
    """The given keys of the config.json that came with the weights, if there is one."""
    theirs = checkpoint.origin.json("config.json") if checkpoint.origin else {}
    return {key: theirs[key] for key in keys if theirs.get(key) is not None}


def from_arrays(params: Any, where: Path) -> dict[str, Tensor]:
    """Tensors of parameters that are in memory already."""

    def reader(array: Any) -> Callable[..., np.ndarray]:
        return lambda row=None: np.asarray(array if row is None else array[row])

    return {
        path: Tensor(where, leaf.shape, "F32", reader(leaf)) for path, leaf in flatten_dict(params, sep="/").items()
    }


def _in_reading_order(entry: Entry) -> tuple[int, ...]:
    numbers = [int(part) for part in entry.name.split(".") if part.isdecimal()]
    return tuple(numbers[:1]) or (-1 if entry.path == "embedding" else 1 << 30,)


def _listed(problems: list[str], most: int = 1000) -> str:
    rest = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join(f"  {line}" for line in [*problems[:most], *rest])
