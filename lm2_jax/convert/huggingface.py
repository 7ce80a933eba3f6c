"""Hugging Face directories: Llama or Mistral, or `modeling_lm2.py` of ours, with the tokenizer's files.

A Llama becomes kind `none`, or by `--set memory.kind=lm2` the start of one with a memory: what a Llama lacks is drawn
anew, and what joins it to the Llama starts at zero, so that the logits are the Llama's before any training. A Mistral
is a Llama with a window (model.window).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from lm2_jax.common.errors import UserError, warn_once
from lm2_jax.common.untrusted import read_json, resolve_inside, short_repr
from lm2_jax.config import Config, parse_config, replace
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
from lm2_jax.convert.llama_config import LLAMAS, from_llama, number, rope_parameters, to_llama
from lm2_jax.convert.model_card import write_card
from lm2_jax.convert.rotary import without_rope_tables
from lm2_jax.convert.tables import (
    CAN_BE_ADDED,
    LM2_FORMER_NAMES,
    LM2_START_BANK,
    STARTS_AT_ZERO,
    Table,
    llama,
    lm2,
)
from lm2_jax.convert.tensors import Tensor, open_tensors, write_tensors
from lm2_jax.convert.tokenizer_files import special_ids, write_generation, write_tokenizer
from lm2_jax.model import build_model
from lm2_jax.model.lora import is_addition
from lm2_jax.tokenizer import Origin

_CODE = Path(__file__).parent / "huggingface_model"
_OURS = "lm2"  # the model_type of configuration_lm2.py, for every kind of memory
_TRANSFORMERS = "5.4.0"  # the version whose form our files have
_LONGEST_SEGMENT = 2048  # of a Llama, unless --set data.segment_length says otherwise
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LONGEST = ("max_position_embeddings",)
_WINDOW_KEYS = ("window", "sinks", "max_distance")  # of modeling_lm2.py, as of our model section
# Settings of modeling_lm2.py that are keys of our memory section
_MEMORY_KEYS = {
    "memory_kind": "kind",
    "memory_slots": "num_slots",
    "memory_width": "width",
    "memory_heads": "num_heads",
    "memory_first_layer": "first_layer",
    "memory_layers": "num_layers",
    "memory_gates": "gates",
    "memory_write": "write",
    "memory_write_slots": "write_slots",
    "memory_dropout": "dropout",
}
_START_BANKS = ("lm2", "official")  # kinds whose bank at a document's start our modelling code reads from a tensor


class ForeignLlama(NamedTuple):
    """A Llama of any format.

    Attributes:
      path: its file or directory, for messages.
      settings_path: the file with its settings, for messages.
      settings: with the names of Hugging Face's config.json.
      tensors: by the names of `table`.
      table: the layout; takes whether the embedding is the head, too.
      files: the directory with its config.json, its tokenizer and what else came with it.
    """

    path: Path
    settings_path: Path
    settings: dict[str, Any]
    tensors: Mapping[str, Tensor]
    table: Callable[[bool], Table]
    files: Path


def read(path: Path, overrides: Sequence[str], track: Track) -> Checkpoint:
    """Opens a directory of a Llama or a Mistral (safetensors, sharded or not) or of our `LM2ForCausalLM`.

    Raises UserError with all that is missing, unknown, mis-shaped or not finite.
    """
    theirs = read_json(path / "config.json")
    if theirs.get("model_type") in LLAMAS:
        found = ForeignLlama(path, path / "config.json", theirs, open_tensors(path, "model"), llama, path)
        return read_llama(found, overrides, track)
    if theirs.get("model_type") == _OURS:
        return _read_lm2(path, theirs, overrides, track)
    found = short_repr(theirs.get("model_type"))
    raise UserError(f"{path}/config.json: model_type: found {found}; expected llama, mistral or {_OURS}")


def write(checkpoint: Checkpoint, directory: Path, dtype: str, track: Track) -> None:
    """Writes a Llama or a Mistral where the model is one, otherwise a directory with our modelling code."""
    config = checkpoint.config
    ids = _special_ids(checkpoint)
    table = llama(config.model.tie_embeddings)
    window, has_sinks = config.model.window, config.model.sinks > 0
    if not has_sinks and all(table_key(path) in table.rules for path in checkpoint.params):
        name = "llama" if window is None else "mistral"
        settings = to_llama(config) | {"dtype": dtype, **ids}
        settings["rope_parameters"] = rope_parameters(settings)
        settings |= {"model_type": name, "architectures": [f"{name.capitalize()}ForCausalLM"]}
        settings |= {} if window is None else {"sliding_window": window}
        settings |= {"max_position_embeddings": config.trained_segment_length, **carried(checkpoint, _LONGEST)}
        settings["transformers_version"] = _TRANSFORMERS
    else:
        settings, table = lm2_settings(checkpoint, dtype), lm2(config.model.tie_embeddings)
        copy_code(directory)
    tensors = as_theirs(table, checkpoint, dtype, track)
    write_tensors(directory, "model", itertools.chain(tensors, start_bank(checkpoint)))
    write_json(settings, directory / "config.json")
    write_generation(ids, checkpoint.origin, directory)
    write_tokenizer(config, checkpoint.origin, directory)
    write_card(checkpoint, directory, settings["model_type"])


def write_json(settings: dict[str, Any], file: Path) -> None:
    """Writes a file of settings."""
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _special_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    return carried(checkpoint, _SPECIAL_IDS) | special_ids(checkpoint.config, checkpoint.origin)


# --- Llama ---------------------------------------------------------------------------------------------------------


def read_llama(found: ForeignLlama, overrides: Sequence[str], track: Track) -> Checkpoint:
    """The Llama as kind none, or what `overrides` make of it. Raises UserError with everything that does not fit."""
    problems: list[str] = []
    values = from_llama(found.settings, problems)
    values["memory"] = {"kind": "none"}
    longest = number(found.settings, "max_position_embeddings", problems, default=_LONGEST_SEGMENT)
    values["data"]["segment_length"] = min(longest, _LONGEST_SEGMENT)
    if found.settings.get("model_type") == "mistral" and found.settings.get("sliding_window") is not None:
        window = values["model"]["window"] = number(found.settings, "sliding_window", problems)
        values["data"]["segment_length"] = max(window, values["data"]["segment_length"])
    config = _config(found.files, found.settings_path, values, overrides, problems)
    if config.model.window is not None and not config.model.sinks and found.settings.get("model_type") == "llama":
        warn_once(
            f"model.window {config.model.window} without model.sinks: a Llama attends to its first token from "
            "everywhere, and breaks where it cannot; set model.sinks to 1 or more"
        )
    if config.model.window is not None and config.model.max_distance is None:
        config = replace(config, model={"max_distance": max(longest, config.model.window) - 1})
    table, shapes = found.table(config.model.tie_embeddings), abstract_params(config)
    tensors = without_rope_tables(found.tensors, config.model, found.path)
    strange = sorted({table_key(name) for name in shapes} - table.rules.keys() - CAN_BE_ADDED)
    if strange:
        raise UserError(
            f"--set: a Llama cannot become memory.kind {config.memory.kind}, whose {', '.join(strange)} would change "
            "its logits; it can become kind lm2"
        )
    in_llama = {name: shape for name, shape in shapes.items() if table_key(name) in table.rules}
    params = read_as_ours(table, tensors, in_llama, config, [], found.path, track)
    params |= _initialised(config, shapes.keys() - in_llama.keys(), found.path)
    return Checkpoint(config, params, origin=Origin(found.files))


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
    config = lm2_config(path, theirs, overrides)
    tensors = {LM2_FORMER_NAMES.get(name, name): tensor for name, tensor in open_tensors(path, "model").items()}
    table = lm2(config.model.tie_embeddings)
    params, memory = lm2_params(config, abstract_params(config), tensors, table, path, track)
    return Checkpoint(config, params, memory, Origin(path))


def lm2_config(path: Path, theirs: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The config that a config.json of our modelling code describes. Raises UserError with all problems."""
    problems: list[str] = []
    values = from_llama(theirs, problems)
    values["model"]["conv_width"] = theirs.get("conv_width", 0)
    values["model"] |= {key: theirs[key] for key in _WINDOW_KEYS if theirs.get(key) is not None}
    values["data"]["segment_length"] = number(theirs, "segment_length", problems)
    values["memory"] = {ours: theirs[key] for key, ours in _MEMORY_KEYS.items() if theirs.get(key) is not None}
    return _config(path, path / "config.json", values, overrides, problems)


def lm2_params(
    config: Config,
    shapes: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    table: Table,
    where: Path,
    track: Track,
) -> tuple[dict[str, Tensor], np.ndarray | None]:
    """Parameters of these shapes from tensors of our modelling code, and the start memory that only `official` carries.

    Raises UserError with everything that does not fit.
    """
    shares_bank, bank = build_model(config).kind.shares_one_bank, []
    if config.memory.kind in _START_BANKS:
        N, M = config.memory.num_slots, config.spec.memory_width
        lanes = tensors[LM2_START_BANK].shape[:1] if shares_bank and LM2_START_BANK in tensors else (1,) * shares_bank
        bank = [Entry(LM2_START_BANK, None, LM2_START_BANK, (), (*lanes, N, M), False)]
    params = read_as_ours(table, tensors, shapes, config, bank, where, track)
    memory = tensors[LM2_START_BANK].read().astype(np.float32) if bank else None
    if bank and not shares_bank:
        ((name, expected_NM),) = start_bank(Checkpoint(config, {}))
        if not np.allclose(memory, expected_NM, atol=4e-3):  # bfloat16 rounds it
            raise UserError(f"{where}: {name}: differs from the fixed initial bank of this model")
        memory = None
    return params, memory


def lm2_settings(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """The config.json of our modelling code. Raises UserError for a memory that it does not have."""
    _check_code(checkpoint)
    config, rows = checkpoint.config, 1 if checkpoint.memory is None else len(checkpoint.memory)
    layers = config.spec.num_memory_layers or None
    memory = config.memory.model_copy(update={"width": config.spec.memory_width, "num_layers": layers})
    settings = to_llama(config)
    settings["rope_parameters"] = rope_parameters(settings)
    for key in ("rope_theta", "rope_scaling"):  # only for older versions of transformers, which cannot run it
        del settings[key]
    return settings | {
        "dtype": dtype,
        **_special_ids(checkpoint),
        "model_type": _OURS,
        "architectures": ["LM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lm2.LM2Config",
            "AutoModel": "modeling_lm2.LM2Model",
            "AutoModelForCausalLM": "modeling_lm2.LM2ForCausalLM",
        },
        "conv_width": config.model.conv_width,
        **{key: getattr(config.model, key) for key in _WINDOW_KEYS},
        "segment_length": config.trained_segment_length,
        "memory_rows": rows,
        **{key: getattr(memory, ours) for key, ours in _MEMORY_KEYS.items()},
        "transformers_version": _TRANSFORMERS,
    }


def _check_code(checkpoint: Checkpoint) -> None:
    rules = lm2(checkpoint.config.model.tie_embeddings).rules
    missing = sorted({table_key(path) for path in checkpoint.params if not is_addition(path)} - rules.keys())
    if missing:
        raise UserError(
            f"memory.kind {checkpoint.config.memory.kind}: our modelling code in PyTorch has no {', '.join(missing)}; "
            "such a model stays in lm2_jax, which trains, evaluates and generates with it"
        )


def copy_code(directory: Path) -> None:
    """Writes our modelling code."""
    for file in sorted(_CODE.glob("*.py")):
        shutil.copyfile(file, directory / file.name)


def start_bank(checkpoint: Checkpoint) -> list[tuple[str, np.ndarray]]:
    """The bank at a document's start, which torch could not draw; nothing where it is learned, or there is none."""
    if checkpoint.config.memory.kind not in _START_BANKS:
        return []
    if checkpoint.memory is not None:
        return [(LM2_START_BANK, checkpoint.memory)]
    model = build_model(checkpoint.config)
    start = np.asarray(model.kind.init_memory(1, None))
    return [(LM2_START_BANK, start if model.kind.shares_one_bank else start[0, 0])]


def _config(
    files: Path, settings_path: Path, values: dict[str, Any], overrides: Sequence[str], problems: list[str]
) -> Config:
    tokenizer = [("tokenizers", files / "tokenizer.json"), ("sentencepiece", files / "tokenizer.model")]
    for kind, file in tokenizer:
        if file.is_file():
            values["tokenizer"] = {"kind": kind, "path": str(resolve_inside(files, file.name))}
            values["data"] |= {"source": "text", "path": ["text/*.txt"]}
            break
    if problems:
        raise UserError("\n".join(f"{settings_path}: {problem}" for problem in problems))
    return parse_config(json.dumps(values), overrides, where=str(settings_path))
