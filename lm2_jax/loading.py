"""Loads a trained model: from a run directory, one of its checkpoints, or a converted directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.checkpoint.frozen import restore_frozen
from lm2_jax.checkpoint.manager import DamagedError
from lm2_jax.common.errors import UserError, first_line
from lm2_jax.config import Config, load_config
from lm2_jax.convert import directory as converted
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.lora import is_addition
from lm2_jax.model.trained import join_params, split_params, trained_names


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


def load(path: str | Path) -> tuple[Decoder, Any]:
    """The model and its parameters from a run directory (its newest checkpoint), one checkpoint, or a converted one.

    Returns the linen module and the tree under "params". Raises UserError if there is no readable checkpoint.
    """
    _, model, params = load_run(path)
    return model, params


def load_run(path: str | Path) -> LoadedRun:
    """Does what `load` does, and returns the run's config as well."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory, one of its checkpoints, or a converted one")
    if converted.is_converted(path):
        found = converted.read(path)
        params = unflatten_dict({p: jnp.asarray(t.read()) for p, t in found.params.items()}, sep="/")
        return LoadedRun(found.config, build_model(found.config), params)
    checkpoint = _checkpoint_of(path)
    config = load_config(path / "config.yaml" if checkpoint != path else path / "config" / "metadata")
    path = checkpoint
    model = build_model(config)
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one), model.abstract_params())
    trained, frozen = split_params(abstract, trained_names(model, config.optim.train))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / "params", trained)
        progress = json.loads((path / "progress" / "metadata").read_text(encoding="utf-8"))
        if array_checksums(params) != progress["checksums"][: len(jax.tree.leaves(params))]:
            raise DamagedError("parameters fail their checksums")
    except Exception as error:  # whatever Orbax or TensorStore make of damaged files
        raise UserError(f"{path}: the checkpoint cannot be read ({first_line(error)}); take an older one") from error
    dtype = config.train.frozen_dtype
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=on_one), frozen)
    frozen = restore_frozen(path.parent.parent, frozen, progress.get("frozen", []))
    frozen = jax.tree.map(lambda x: x.astype("float32"), frozen)
    return LoadedRun(config, model, join_params(params, frozen))


def read_progress(path: str | Path) -> dict[str, int]:
    """`step` and `tokens` of a run directory's newest checkpoint, or of one checkpoint, that `load_run` has read."""
    text = (_checkpoint_of(Path(path).absolute()) / "progress" / "metadata").read_text(encoding="utf-8")
    progress = json.loads(text)
    return {key: progress[key] for key in ("step", "tokens")}


def _checkpoint_of(path: Path) -> Path:
    """The newest checkpoint of a run directory; a checkpoint itself. Raises UserError if it is neither."""
    if (path / "config.yaml").is_file():
        steps = [int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit()]
        if not steps:
            raise UserError(f"{path}: a run directory without a checkpoint")
        return path / "checkpoints" / str(max(steps))
    if not (path / "config" / "metadata").is_file():
        raise UserError(f"{path}: neither a run directory (no config.yaml) nor a checkpoint (no config)")
    return path


def load_memory(path: str | Path) -> Any:
    """The start memory that a converted directory carries (official: memory_bank [B,N,N]); None if it carries none."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    memory = converted.read(path).memory if converted.is_converted(path) else None
    return None if memory is None else jnp.asarray(memory)


def load_weights(path: str, model: Decoder, initial: Any) -> Any:
    """Parameters to start `model` from, of another run or a converted directory.

    Low-rank additions that are not there are taken from `initial`, a whole tree of parameters of the model. Raises
    UserError if the parameters belong to another model.
    """
    _, other, params = load_run(path)
    own, found = (flatten_dict(tree, sep="/") for tree in (initial, params))
    found = {name: leaf for name, leaf in own.items() if is_addition(name)} | found
    params = unflatten_dict(found, sep="/")
    own, found = ({name: leaf.shape for name, leaf in leaves.items()} for leaves in (own, found))
    problems = [
        f"  {name}: {found.get(name, 'nothing')} there, {own.get(name, 'nothing')} in this model"
        for name in sorted(own.keys() | found.keys())
        if own.get(name) != found.get(name)
    ]
    problems += [
        f"  {key}: {old!r} there, {new!r} here"
        for key, old, new in differences(_meaning_of_weights(other), _meaning_of_weights(model))
    ]
    theirs, here = (decoder.spec.model.lora for decoder in (other, model))
    if theirs is not None and here is not None and theirs.alpha * here.rank != here.alpha * theirs.rank:
        problems.append(f"  model.lora.alpha: {theirs.alpha:g} there, {here.alpha:g} here")
    rows, own_rows = (decoder.spec.model.vocab_size for decoder in (other, model))
    if rows > own_rows:
        problems.append(f"  if ids from {own_rows} on are padding there, set model.vocab_size to {rows} here")
    if problems:
        raise UserError(f"train.init_from: {path} holds another model:\n" + "\n".join(problems))
    return params


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of everything in which two nested dictionaries differ."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        for name in before:
            yield from differences(before[name], now[name], f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def _meaning_of_weights(model: Decoder) -> dict[str, Any]:
    """The settings that give weights a meaning besides their shapes.

    The number of slots is not one of them, nor is how far attention reaches: a window may be set on any weights.
    """
    spec = model.spec
    settings = spec.model.model_copy(update={"head_dim": spec.model.attention_head_dim})
    memory = spec.memory.model_dump(include={"kind", "num_heads", "gates"}) if spec.num_memory_layers else None
    return {
        "model": settings.model_dump(exclude={"embedding_std", "window", "sinks", "max_distance", "lora"}),
        "memory": memory,
    }
