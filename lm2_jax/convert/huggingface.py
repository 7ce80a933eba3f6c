"""Hugging Face directories: `LlamaForCausalLM`, or `modeling_lm2.py` of ours, with the tokenizer's files.

A Llama becomes kind `none`, or by `--set memory.kind=...` the start of a model with a memory: what a Llama lacks is
drawn anew, and what joins it to the Llama starts at zero, so that the logits are the Llama's before any training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.config import Config, parse_config
from lm2_jax.convert.engine import (
    Checkpoint,
    Entry,
    Track,
    abstract_params,
    as_theirs,
    by_path,
    check_names,
    check_values,
    entries,
    from_arrays,
    place,
    seen_as_ours,
)
from lm2_jax.convert.llama_config import from_llama, number, to_llama
from lm2_jax.convert.tables import llama, lm2
from lm2_jax.convert.tensors import Tensor, open_tensors, read_json, write_tensors
from lm2_jax.convert.tokenizer_files import special_ids, write_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.model import build_model

_CODE = Path(__file__).parent / "huggingface_model"
_OURS = "lm2"  # the model_type of configuration_lm2.py, for every kind of memory
_LONGEST_SEGMENT = 2048  # of a Llama, unless --set data.segment_length says otherwise
# What joins to a Llama's activations in a warm start: the projection of what the slots answer, and the convolution
_STARTS_AT_ZERO = ("memory/read_output", "conv/kernel")
# Settings of modeling_lm2.py that are keys of our memory section
_MEMORY_KEYS = {
    "memory_kind": "kind",
    "memory_slots": "num_slots",
    "memory_width": "width",
    "memory_heads": "num_heads",
    "memory_layers": "num_layers",
    "memory_gates": "gates",
    "memory_dropout": "dropout",
    "forget_bias": "forget_bias",
    "input_bias": "input_bias",
}


def read(path: Path, overrides: Sequence[str], track: Track) -> Checkpoint:
    """Opens a directory of `LlamaForCausalLM` (safetensors, sharded or not) or of our `LM2ForCausalLM`.

    Raises UserError with all that is missing, unknown, mis-shaped or not finite.
    """
    theirs = read_json(path / "config.json")
    if theirs.get("model_type") == "llama":
        return _read_llama(path, theirs, overrides, track)
    if theirs.get("model_type") == _OURS:
        return _read_lm2(path, theirs, overrides, track)
    raise UserError(f"{path}/config.json: model_type: found {theirs.get('model_type')!r}; expected llama or {_OURS}")


def write(checkpoint: Checkpoint, directory: Path, dtype: str, track: Track) -> None:
    """Writes a Llama where the model is one, and else a directory with our modelling code."""
    config = checkpoint.config
    settings = to_llama(config) | {"dtype": dtype, **special_ids(config)}
    table = llama(config.model.tie_embeddings)
    if all(place(path) in table.rules for path in checkpoint.params):
        settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        tensors = as_theirs(table, checkpoint, dtype, track)
    else:
        settings |= _lm2_settings(config) | {"memory_rows": 1 if checkpoint.memory is None else len(checkpoint.memory)}
        tensors = as_theirs(lm2(config.model.tie_embeddings), checkpoint, dtype, track)
        for file in sorted(_CODE.glob("*.py")):
            shutil.copyfile(file, directory / file.name)
    write_tensors(directory, "model", (item for part in (tensors, _start(checkpoint)) for item in part))
    text = json.dumps(settings, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    generation = {"_from_model_config": True, **special_ids(config)}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(config, directory)


# --- Llama ---------------------------------------------------------------------------------------------------------


def _read_llama(path: Path, theirs: Mapping[str, Any], overrides: Sequence[str], track: Track) -> Checkpoint:
    problems: list[str] = []
    values = from_llama(theirs, problems)
    values["memory"] = {"kind": "none"}
    longest = number(theirs, "max_position_embeddings", problems, default=_LONGEST_SEGMENT)
    values["data"]["segment_length"] = min(longest, _LONGEST_SEGMENT)
    config = _config(path, values, overrides, problems)
    tensors, shapes = open_tensors(path, "model"), abstract_params(config)
    table = llama(config.model.tie_embeddings)
    theirs_too = {name: shape for name, shape in shapes.items() if place(name) in table.rules}
    wanted = entries(table, theirs_too, config.num_memory_layers)
    check_names(wanted, tensors, table, path)
    check_values(track(wanted, "checking"), tensors, path)
    params = seen_as_ours(wanted, tensors, theirs_too)
    return Checkpoint(config, params | _drawn_anew(config, shapes.keys() - theirs_too.keys(), path))


def _drawn_anew(config: Config, paths: set[str], where: Path) -> dict[str, Tensor]:
    """Initial values of parameters that a Llama has not; zeros for those that would change its logits."""
    if not paths:
        return {}
    model = build_model(config)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        tokens_BT = jnp.zeros((1, config.data.segment_length), jnp.int32)
        leaves = by_path(model.init(key, tokens_BT, model.init_memory(1))["params"])
        return {p: leaves[p] * (0 if place(p) in _STARTS_AT_ZERO else 1) for p in paths}

    return from_arrays(jax.jit(init)(jax.random.key(config.train.seed)), where)


# --- Our modelling code --------------------------------------------------------------------------------------------


def _read_lm2(path: Path, theirs: Mapping[str, Any], overrides: Sequence[str], track: Track) -> Checkpoint:
    problems: list[str] = []
    values = from_llama(theirs, problems)
    values["model"]["conv_width"] = theirs.get("conv_width", 0)
    values["data"]["segment_length"] = number(theirs, "segment_length", problems)
    values["memory"] = {ours: theirs[key] for key, ours in _MEMORY_KEYS.items() if theirs.get(key) is not None}
    config = _config(path, values, overrides, problems)
    tensors, shapes = open_tensors(path, "model"), abstract_params(config)
    table = lm2(config.model.tie_embeddings)
    wanted = entries(table, shapes, config.num_memory_layers)
    start = dict(_start(Checkpoint(config, {})))
    lanes = {name: tensors[name].shape[:1] if name in tensors else array.shape[:1] for name, array in start.items()}
    banks = [Entry(name, None, name, (), (*lanes[name], *array.shape[1:]), False) for name, array in start.items()]
    check_names([*banks, *wanted], tensors, table, path)
    check_values(track([*banks, *wanted], "checking"), tensors, path)
    memory = None
    for name, array in start.items():
        found = tensors[name].read().astype(np.float32)
        if name == "model.memory_bank":
            memory = found
        elif not np.allclose(found, array, atol=4e-3):  # bfloat16 may have rounded it
            raise UserError(f"{path}: {name}: is another start than this model's; expected the fixed initial bank")
    return Checkpoint(config, seen_as_ours(wanted, tensors, shapes), memory)


def _lm2_settings(config: Config) -> dict[str, Any]:
    layers = config.num_memory_layers or None
    memory = config.memory.model_copy(update={"width": config.memory_width, "num_layers": layers})
    return {
        "model_type": _OURS,
        "architectures": ["LM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lm2.LM2Config",
            "AutoModelForCausalLM": "modeling_lm2.LM2ForCausalLM",
        },
        "conv_width": config.model.conv_width,
        "segment_length": config.data.segment_length,
        **{key: getattr(memory, ours) for key, ours in _MEMORY_KEYS.items()},
    }


def _start(checkpoint: Checkpoint) -> list[tuple[str, np.ndarray]]:
    """The bank at a document's start, which torch could not draw; nothing where it is learned, or there is none."""
    model = build_model(checkpoint.config)
    if not model.kind.num_bank_layers:
        return []
    start = np.asarray(model.init_memory(1))
    if model.kind.bank_passes_through:
        return [("model.memory_bank", start if checkpoint.memory is None else checkpoint.memory)]
    return [("model.initial_bank", start[0, 0])]


def _config(path: Path, values: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> Config:
    tokenizer = [("tokenizers", path / "tokenizer.json"), ("sentencepiece", path / "tokenizer.model")]
    for kind, file in tokenizer:
        if file.is_file():
            values["tokenizer"] = {"kind": kind, "path": str(file)}
            values["data"] |= {"source": "text", "path": ["text/*.txt"]}
            break
    if problems:
        raise UserError("\n".join(f"{path}/config.json: {problem}" for problem in problems))
    return parse_config(json.dumps(values), overrides, where=f"{path}/config.json")
