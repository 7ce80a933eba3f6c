"""Memory on disk: the state of generation as one safetensors file, from which another process continues.

It holds the memory and the unfinished segment (without the memory cache, which is recomputed) and, in its metadata, the
model that they belong to: the config's sections `model` and `memory`, the segment length, and a checksum of every
parameter.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.flax

from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.common.errors import UserError
from lm2_jax.common.files import write_bytes_atomically
from lm2_jax.common.local_copies import local_copy
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.common.untrusted import short_repr
from lm2_jax.config import MemoryConfig, ModelConfig
from lm2_jax.decoding import sampling
from lm2_jax.decoding.placement import is_prepared
from lm2_jax.model.decode import DecodeState, stack, unstack
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.edge import MOST_TOKENS
from lm2_jax.model.layers import KVCache

_KEY = "lm2_jax.memory"  # key of the metadata
_LONGEST_OWNER = 1 << 20  # characters
_DEFAULTS = {"model": ModelConfig().model_dump(mode="json"), "memory": MemoryConfig().model_dump(mode="json")}


def save_state(path: str | AnyPath, model: Decoder, params: Any, state: DecodeState) -> None:
    """Writes the file, completely or not at all. Raises UserError if it cannot be written."""
    metadata = {_KEY: json.dumps(_owner(model, params) | {"segment_length": state.segment_length})}
    path = to_path(path, "--save-memory")
    try:
        write_bytes_atomically(path, safetensors.flax.save(_named(_stacked(state)), metadata))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def load_state(path: str | AnyPath, model: Decoder, params: Any) -> DecodeState:
    """Reads a file that `save_state` wrote with this model.

    Raises UserError, with everything that is wrong, if it is not such a file, belongs to another model, or has missing,
    unknown or misshapen arrays.
    """
    try:
        with safetensors.safe_open(local_copy(to_path(path, "--load-memory")), "flax") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {})[_KEY]
            if len(text) > _LONGEST_OWNER:
                raise ValueError(f"metadata {_KEY} of {len(text):,} characters")
            owner = json.loads(text)
            segment_length = owner.pop("segment_length")
            if type(segment_length) is not int or not 0 < segment_length < 2**31:
                raise ValueError(f"segment_length {short_repr(segment_length)}")
            if not all(isinstance(owner.get(section), dict) for section in ("model", "memory")):
                raise ValueError("it does not say of which model")
    except KeyError:
        raise UserError(f"{path}: not a memory file of lm2_jax (metadata {_KEY} is missing)") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as a memory file ({error})") from None
    problems = list(_differences(owner, _owner(model, params)))
    if problems:
        raise UserError(f"{path}: memory of another model:\n" + "\n".join(problems))

    batch_size = saved["count_B"].size if "count_B" in saved else 1
    like = jax.eval_shape(lambda params: sampling.initial_state(model, params, batch_size, segment_length), params)
    like = jax.eval_shape(_stacked, like)
    expected = _named(like)
    problems += [f"  {name}: is missing" for name in expected.keys() - saved.keys()]
    problems += [f"  {name}: unknown" for name in saved.keys() - expected.keys()]
    for name in expected.keys() & saved.keys():
        found, right = ((x.shape, str(x.dtype)) for x in (saved[name], expected[name]))
        if found != right:
            problems.append(f"  {name}: found {found[1]} {[*found[0]]}; should be {right[1]} {[*right[0]]}")
    if not problems and not ((saved["count_B"] >= 0) & (saved["count_B"] <= segment_length)).all():
        problems.append(f"  count_B: found {saved['count_B'].tolist()}; should be within 0 and {segment_length}")
    if not problems and not (saved["read_B"] >= saved["count_B"]).all():
        problems.append(f"  read_B: found {saved['read_B'].tolist()}; should be at least count_B")
    for name in () if problems else sorted(name for name in saved if name.endswith(".length_B")):
        before_B = jnp.minimum(saved["read_B"] - saved["count_B"], MOST_TOKENS)
        if (saved[name] != before_B).any():
            problems.append(f"  {name}: found {saved[name].tolist()}; should be {before_B.tolist()} in every layer")
    problems += [f"  {name}: holds NaN or infinite numbers" for name, x in saved.items() if not jnp.isfinite(x).all()]
    if problems:
        raise UserError(f"{path}: does not hold the arrays of this model's memory:\n" + "\n".join(sorted(problems)))
    stacked = jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in expected])
    caches = {name: unstack(_swap_heads(cache), model.stacks[name]) for name, cache in stacked.caches.items()}
    return sampling.with_memory_cache(model, params, stacked.replace(caches=caches))


def _stacked(state: DecodeState) -> DecodeState:
    """The state as the file has it: without the memory cache, layers stacked, keys [L,B,C,G,K]."""
    caches = {name: _swap_heads(stack(layers)) for name, layers in state.caches.items()}
    return state.replace(memory_cache=[], caches=caches)


def _swap_heads(cache: KVCache) -> KVCache:
    """Exchanges the axes of heads and positions of keys and values."""
    keys, values = (x.swapaxes(2, 3) for x in (cache.keys_BGCK, cache.values_BGCK))
    return cache.replace(keys_BGCK=keys, values_BGCK=values)


def _named(stacked: DecodeState) -> dict[str, Any]:
    """The state's arrays, in order, by their names in the file, such as past.blocks.keys_BCGK."""
    leaves = jax.tree_util.tree_leaves_with_path(stacked)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    names = (re.sub(r"^caches\b", "past", name).replace("_BGCK", "_BCGK") for name in names)
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _owner(model: Decoder, params: Any) -> dict[str, Any]:
    if is_prepared(model, params):
        raise ValueError("a memory file names the parameters by their checksums; give them as they were loaded")
    sections = {name: getattr(model.spec, name).model_dump(mode="json") for name in ("model", "memory")}
    return {**sections, "parameters": array_checksums(params)}


def _differences(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    lines = []
    for section in ("model", "memory"):
        found, right = saved.get(section, {}), own[section]
        found = {**_DEFAULTS[section], **found}  # of settings that are newer than the file
        keys = [key for key in sorted({*found, *right}) if found.get(key) != right.get(key)]
        for key in keys:
            lines.append(
                f"  {section}.{key}: {short_repr(found.get(key))} in the file, {right.get(key)!r} in the model"
            )
    if not lines and saved.get("parameters") != own["parameters"]:
        lines.append("  the same sizes, but other parameters; take the checkpoint that it was saved with")
    return lines
