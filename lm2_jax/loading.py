"""Loads a trained model: from a run directory, one of its checkpoints, or a converted directory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.checkpoint.frozen import restore_frozen
from lm2_jax.checkpoint.manager import DamagedError
from lm2_jax.checkpoint.store import complete_steps, orbax_path
from lm2_jax.common.errors import UserError, first_line
from lm2_jax.common.local_copies import local_tree
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.config import Config, load_config
from lm2_jax.convert import directory as converted
from lm2_jax.convert.engine import Checkpoint, Track, from_arrays, table_key
from lm2_jax.convert.tables import CAN_BE_ADDED, STARTS_AT_ZERO
from lm2_jax.model import build_model
from lm2_jax.model.decoder import STACKS, Decoder
from lm2_jax.model.lora import is_addition
from lm2_jax.model.trained import join_params, split_params, trained_names
from lm2_jax.parallel.mesh import one_device_mesh
from lm2_jax.tokenizer import origin_of_model


class LoadedRun(NamedTuple):
    """A trained model with the config of its run.

    Attributes:
      config: complete; of a converted directory, sections that it does not carry are defaults.
      model: the linen module.
      params: the tree under "params".
    """

    config: Config
    model: Decoder
    params: Any


def load(path: str | AnyPath) -> tuple[Decoder, Any]:
    """The model and its parameters from a run directory (its newest checkpoint), one checkpoint, or a converted one.

    Returns the linen module and the tree under "params". Raises UserError if there is no readable checkpoint.
    """
    _, model, params = load_run(path)
    return model, params


def load_run(path: str | AnyPath) -> LoadedRun:
    """Does what `load` does, and returns the run's config as well."""
    path = _existing(path, "; give a run directory, one of its checkpoints, or a converted one")
    if converted.is_converted(path):
        found = converted.read(local_tree(path))
        params = unflatten_dict({p: jnp.asarray(t.read()) for p, t in found.params.items()}, sep="/")
        return LoadedRun(found.config, build_model(found.config), params)
    checkpoint = _checkpoint_of(path)
    config = load_config(path / "config.yaml" if checkpoint != path else path / "config" / "metadata")
    model = build_model(config)
    with jax.set_mesh(one_device_mesh()):  # where a run's mesh is set, too
        return LoadedRun(config, model, _read_params(checkpoint, config, model))


def _read_params(path: AnyPath, config: Config, model: Decoder) -> Any:
    """The whole tree of parameters of a checkpoint, float32. Raises UserError if it cannot be read, or is damaged."""
    on_one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one), model.abstract_params())
    trained, frozen = split_params(abstract, trained_names(model, config.optim.train))
    frozen = jax.tree.map(lambda x: x.update(dtype=config.train.frozen_dtype), frozen)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(orbax_path(path / "params"), trained)
        progress = json.loads((path / "progress" / "metadata").read_text(encoding="utf-8"))
        if array_checksums(params) != progress["checksums"][: len(jax.tree.leaves(params))]:
            raise DamagedError("parameters fail their checksums")
    except Exception as error:  # whatever Orbax or TensorStore make of damaged files
        raise UserError(f"{path}: the checkpoint cannot be read ({first_line(error)}); take an older one") from error
    frozen = restore_frozen(path.parent.parent, frozen, progress.get("frozen", []))
    return join_params(params, jax.tree.map(lambda x: x.astype("float32"), frozen))


def read_checkpoint(path: AnyPath, track: Track) -> Checkpoint:
    """A model to convert: a converted directory, tensor by tensor; or a run directory or a checkpoint, whole.

    Raises UserError if it cannot be read.
    """
    if converted.is_converted(path):
        return converted.read(local_tree(path), track)
    config, _, params = load_run(path)
    origin = origin_of_model(config.tokenizer, path)
    return Checkpoint(config, from_arrays(params, path), origin=origin, trained=read_progress(path))


def read_progress(path: str | AnyPath) -> dict[str, int]:
    """`step` and `tokens` of a run directory's newest checkpoint, or of one checkpoint, that `load_run` has read."""
    text = (_checkpoint_of(to_path(path).absolute()) / "progress" / "metadata").read_text(encoding="utf-8")
    progress = json.loads(text)
    return {key: progress[key] for key in ("step", "tokens")}


def _checkpoint_of(path: AnyPath) -> AnyPath:
    """The newest checkpoint of a run directory; a checkpoint itself. Raises UserError if it is neither."""
    if (path / "config.yaml").is_file():
        steps = complete_steps(path / "checkpoints")
        if not steps:
            raise UserError(f"{path}: a run directory without a checkpoint")
        return path / "checkpoints" / str(max(steps))
    if not (path / "config" / "metadata").is_file():
        raise UserError(f"{path}: neither a run directory (no config.yaml) nor a checkpoint (no config)")
    return path


def _existing(path: str | AnyPath, remedy: str = "") -> AnyPath:
    """The directory of a path. Raises UserError if there is none."""
    path = to_path(path).absolute()
    try:
        if path.is_dir():
            return path
    except OSError as error:  # of a store
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    raise UserError(f"{path}: no such directory{remedy}")


def load_memory(path: str | AnyPath) -> Any:
    """The start memory that a converted directory carries (official: memory_bank [B,N,N]); None if it carries none."""
    path = _existing(path)
    memory = converted.read(local_tree(path)).memory if converted.is_converted(path) else None
    return None if memory is None else jnp.asarray(memory)


def load_weights(path: str, model: Decoder, initial: Any) -> Any:
    """Parameters to start `model` from, of another run or a converted directory.

    A model without memory may be given one, and any model low-rank additions: both come from `initial`, a whole tree of
    parameters, with zeros where they join the model, so that its logits stay what they are. Raises UserError if the
    parameters belong to another model.
    """
    _, other, params = load_run(path)
    own, found = (flatten_dict(tree, sep="/") for tree in (initial, params))
    if not other.kind.num_bank_layers:
        found = _in_other_stacks(found, model.stacks)
    for name in sorted(own.keys() - found.keys()):  # all processes compute alike, in one order
        if is_addition(name) or _can_be_added(name, other):
            found[name] = own[name] * (0 if table_key(name) in STARTS_AT_ZERO else 1)
    own_shapes, shapes = ({name: leaf.shape for name, leaf in leaves.items()} for leaves in (own, found))
    problems = [
        f"  {name}: {shapes.get(name, 'nothing')} there, {own_shapes.get(name, 'nothing')} in this model"
        for name in sorted(own.keys() | found.keys())
        if own_shapes.get(name) != shapes.get(name)
    ]
    meanings = _meaning_of_weights(other), _meaning_of_weights(model)
    problems += [
        f"  {key}: {old!r} there, {new!r} here"
        for key, old, new in differences(*meanings)
        if old is not None or key not in _MAY_BE_NEW
    ]
    rows, own_rows = (decoder.spec.model.vocab_size for decoder in (other, model))
    if rows > own_rows:
        problems.append(f"  if ids from {own_rows} on are padding there, set model.vocab_size to {rows} here")
    if problems:
        raise UserError(f"train.init_from: {path} holds another model:\n" + "\n".join(problems))
    return unflatten_dict(found, sep="/")


def _in_other_stacks(leaves: Mapping[str, jax.Array], stacks: Mapping[str, int]) -> dict[str, jax.Array]:
    """The parameters of a model whose blocks are one stack, by path, with the blocks divided into `stacks`."""
    found = {}
    for name, leaf in leaves.items():
        stack, _, within = name.partition("/")
        if stack not in STACKS:
            found[name] = leaf
        elif len(leaf) == sum(stacks.values()):
            ends = list(itertools.accumulate(stacks.values()))[:-1]
            found |= {f"{own}/{within}": rows for own, rows in zip(stacks, jnp.split(leaf, ends), strict=True)}
        else:  # of another number of layers, which is refused under the name that it has
            found[name] = leaf
    return found


def _can_be_added(name: str, other: Decoder) -> bool:
    """True for parameters of a memory or a convolution, if the model that is there has none."""
    new_memory = "/memory/" in name and not other.kind.num_bank_layers
    new_convolution = "/conv" in name and not other.spec.model.conv_width
    return table_key(name) in CAN_BE_ADDED and (new_memory or new_convolution)


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of everything in which two nested dictionaries differ."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        for name in before:
            yield from differences(before[name], now[name], f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


_SCALE = "model.lora.alpha / rank"
_MAY_BE_NEW = ("model.conv_width", _SCALE, "memory.kind", "memory.num_heads", "memory.gates")


def _meaning_of_weights(model: Decoder) -> dict[str, Any]:
    """The settings that give weights a meaning besides their shapes; None for what the model has not.

    The number of slots is not one of them, nor is how far attention reaches: a window may be set on any weights.
    """
    spec = model.spec
    c, memory = spec.model, spec.memory
    settings = c.model_copy(update={"head_dim": c.attention_head_dim, "conv_width": c.conv_width or None})
    has_banks = model.kind.num_bank_layers
    return {
        "model": settings.model_dump(exclude={"embedding_std", "window", "sinks", "max_distance", "lora"}),
        _SCALE: c.lora and c.lora.alpha / c.lora.rank,
        **{f"memory.{key}": getattr(memory, key) if has_banks else None for key in ("kind", "num_heads", "gates")},
    }
