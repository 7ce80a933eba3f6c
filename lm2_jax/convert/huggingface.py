"""Hugging Face directories: `LlamaForCausalLM`, or `modeling_lm2.py` of ours, with the tokenizer's files.

A Llama becomes kind `none`, or by `--set memory.kind=lm2` the start of one with a memory: what a Llama lacks is drawn
anew, and what joins it to the Llama starts at zero, so that the logits are the Llama's before any training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import resolve_inside, short_repr
from lm2_jax.config import Config, parse_config
from lm2_jax.convert.engine import (
    Checkpoint,
    Entry,
    Track,
    abstract_params,
    as_theirs,
    carried,
    from_arrays,
    read_as_ours,
    table_key,
)
from lm2_jax.convert.llama_config import from_llama, number, rope_parameters, to_llama
from lm2_jax.convert.model_card import write_card
from lm2_jax.convert.rotary import without_rope_tables
from lm2_jax.convert.tables import CAN_BE_ADDED, STARTS_AT_ZERO, llama, lm2
from lm2_jax.convert.tensors import Tensor, open_tensors, read_json, write_tensors
from lm2_jax.convert.tokenizer_files import special_ids, write_tokenizer
from lm2_jax.model import build_model

_CODE = Path(__file__).parent / "huggingface_model"
_OURS = "lm2"  # the model_type of configuration_lm2.py, for every kind of memory
_TRANSFORMERS = "5.4.0"  # the version whose form our files have
_LONGEST_SEGMENT = 2048  # of a Llama, unless --set data.segment_length says otherwise
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Settings of modeling_lm2.py that are keys of our memory section
_MEMORY_KEYS = {
    "memory_kind": "kind",
    "memory_slots": "num_slots",
    "memory_width": "width",
    "memory_heads": "num_heads",
    "memory_layers": "num_layers",
    "memory_gates": "gates",
    "memory_dropout": "dropout",
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
    found = short_repr(theirs.get("model_type"))
    raise UserError(f"{path}/config.json: model_type: found {found}; expected llama or {_OURS}")


def write(checkpoint: Checkpoint, directory: Path, dtype: str, track: Track) -> None:
    """Writes a Llama where the model is one, otherwise a directory with our modelling code."""
    config = checkpoint.config
    ids = special_ids(config)
    settings = to_llama(config) | {"dtype": dtype, "max_position_embeddings": config.trained_segment_length, **ids}
    settings["rope_parameters"] = rope_parameters(settings)
    table = llama(config.model.tie_embeddings)
    if all(table_key(path) in table.rules for path in checkpoint.params):
        settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **carried(checkpoint, _CARRIED)}
        tensors = as_theirs(table, checkpoint, dtype, track)
    else:
        settings |= _lm2_settings(checkpoint)
        for key in ("max_position_embeddings", "rope_theta", "rope_scaling"):  # text of any length; transformers 5
            del settings[key]
        tensors = as_theirs(lm2(config.model.tie_embeddings), checkpoint, dtype, track)
        for file in sorted(_CODE.glob("*.py")):
            shutil.copyfile(file, directory / file.name)
    settings["transformers_version"] = _TRANSFORMERS
    write_tensors(directory, "model", (item for part in (tensors, _start(checkpoint)) for item in part))
    text = json.dumps(settings, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    generation = {"_from_model_config": True, **ids}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(config, directory)
    write_card(checkpoint, directory, with_code=settings["model_type"] == _OURS)
    for name in _FILES:
        if checkpoint.origin is not None and (checkpoint.origin / name).is_file():
            shutil.copyfile(resolve_inside(checkpoint.origin, name), directory / name)


# --- Llama ---------------------------------------------------------------------------------------------------------


def _read_llama(path: Path, theirs: Mapping[str, Any], overrides: Sequence[str], track: Track) -> Checkpoint:
    problems: list[str] = []
    values = from_llama(theirs, problems)
    values["memory"] = {"kind": "none"}
    longest = number(theirs, "max_position_embeddings", problems, default=_LONGEST_SEGMENT)
    values["data"]["segment_length"] = min(longest, _LONGEST_SEGMENT)
    config = _config(path, values, overrides, problems)
    tensors = without_rope_tables(open_tensors(path, "model"), config.model, path)
    shapes = abstract_params(config)
    table = llama(config.model.tie_embeddings)
    strange = sorted({table_key(name) for name in shapes} - table.rules.keys() - CAN_BE_ADDED)
    if strange:
        raise UserError(
            f"--set: a Llama cannot become memory.kind {config.memory.kind}, whose {', '.join(strange)} would change "
            "its logits; it can become kind lm2"
        )
    in_llama = {name: shape for name, shape in shapes.items() if table_key(name) in table.rules}
    params = read_as_ours(table, tensors, in_llama, config.spec.num_memory_layers, [], path, track)
    return Checkpoint(config, params | _initialised(config, shapes.keys() - in_llama.keys(), path), origin=path)


def _initialised(config: Config, paths: set[str], where: Path) -> dict[str, Tensor]:
    """Initial values of parameters that a Llama lacks; zeros for those that would change its logits."""
    if not paths:
        return {}
    model = build_model(config)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flatten_dict(model.init_params(key), sep="/")
        return {p: leaves[p] * (0 if table_key(p) in STARTS_AT_ZERO else 1) for p in paths}

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
    shares_bank, bank = build_model(config).kind.shares_one_bank, []
    if config.spec.num_memory_layers:
        name, N, M = _bank_name(config), config.memory.num_slots, config.spec.memory_width
        lanes = tensors[name].shape[:1] if shares_bank and name in tensors else (1,) * shares_bank
        bank = [Entry(name, None, name, (), (*lanes, N, M), False)]
    params = read_as_ours(table, tensors, shapes, config.spec.num_memory_layers, bank, path, track)
    memory = tensors[bank[0].name].read().astype(np.float32) if shares_bank else None
    if bank and not shares_bank:
        ((name, expected_NM),) = _start(Checkpoint(config, {}))
        if not np.allclose(tensors[name].read().astype(np.float32), expected_NM, atol=4e-3):  # bfloat16 rounds it
            raise UserError(f"{path}: {name}: differs from the fixed initial bank of this model")
    return Checkpoint(config, params, memory, path)


def _lm2_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    config, rows = checkpoint.config, 1 if checkpoint.memory is None else len(checkpoint.memory)
    layers = config.spec.num_memory_layers or None
    memory = config.memory.model_copy(update={"width": config.spec.memory_width, "num_layers": layers})
    return {
        "model_type": _OURS,
        "architectures": ["LM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lm2.LM2Config",
            "AutoModelForCausalLM": "modeling_lm2.LM2ForCausalLM",
        },
        "conv_width": config.model.conv_width,
        "segment_length": config.trained_segment_length,
        "memory_rows": rows,
        **{key: getattr(memory, ours) for key, ours in _MEMORY_KEYS.items()},
    }


def _start(checkpoint: Checkpoint) -> list[tuple[str, np.ndarray]]:
    """The bank at a document's start, which torch could not draw; nothing where it is learned, or there is none."""
    model = build_model(checkpoint.config)
    if not model.kind.num_bank_layers:
        return []
    if checkpoint.memory is not None:
        return [(_bank_name(checkpoint.config), checkpoint.memory)]
    start = np.asarray(model.init_memory(1))
    return [(_bank_name(checkpoint.config), start if model.kind.shares_one_bank else start[0, 0])]


def _bank_name(config: Config) -> str:
    return "model.memory_bank" if build_model(config).kind.shares_one_bank else "model.initial_bank"


def _config(path: Path, values: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> Config:
    tokenizer = [("tokenizers", path / "tokenizer.json"), ("sentencepiece", path / "tokenizer.model")]
    for kind, file in tokenizer:
        if file.is_file():
            values["tokenizer"] = {"kind": kind, "path": str(resolve_inside(path, file.name))}
            values["data"] |= {"source": "text", "path": ["text/*.txt"]}
            break
    if problems:
        raise UserError("\n".join(f"{path}/config.json: {problem}" for problem in problems))
    return parse_config(json.dumps(values), overrides, where=f"{path}/config.json")
