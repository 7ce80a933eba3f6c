"""Loads a trained model: from a run directory, one of its checkpoints, or a converted directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from lm2_jax.checkpoint.manager import DamagedError, array_checksums, first_line
from lm2_jax.checkpoint.store import complete_steps, orbax_path
from lm2_jax.common.errors import UserError
from lm2_jax.common.local_copies import local_tree
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.config import Config, load_config
from lm2_jax.convert import directory as converted
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Decoder


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
    path = checkpoint
    model = build_model(config)
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one), model.abstract_params())
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(orbax_path(path / "params"), abstract)
        saved = json.loads((path / "progress" / "metadata").read_text(encoding="utf-8"))["checksums"]
        if array_checksums(params) != saved[: len(jax.tree.leaves(params))]:
            raise DamagedError("parameters fail their checksums")
    except Exception as error:  # whatever Orbax or TensorStore make of damaged files
        raise UserError(f"{path}: the checkpoint cannot be read ({first_line(error)}); take an older one") from error
    return LoadedRun(config, model, params)


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


def load_weights(path: str, model: Decoder) -> Any:
    """Parameters to start `model` from, of another run or a converted directory.

    Raises UserError if they belong to another model.
    """
    _, other, params = load_run(path)
    own, found = (flatten_dict(tree, sep="/") for tree in (model.abstract_params(), params))
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
        "model": settings.model_dump(exclude={"embedding_std", "window", "sinks", "max_distance"}),
        "memory": memory,
    }
