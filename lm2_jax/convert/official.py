"""The official code's directory: `state_dict.safetensors` and `config.json`, or a checkpoint file of its trainer.

The config has the names of Hugging Face's Llama, and besides use_memory, memory_slots, num_mem_heads, batch_size,
seq_len (tokens in a segment), segments (in a window of ours) and loss_ignore_index.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import read_json, resolve_inside, short_repr
from lm2_jax.config import Config, parse_config
from lm2_jax.convert.engine import Checkpoint, Entry, Track, abstract_params, as_theirs, carried, read_as_ours
from lm2_jax.convert.llama_config import from_llama, number, to_llama
from lm2_jax.convert.rotary import without_rope_tables
from lm2_jax.convert.tables import official
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.tokenizer import Origin

_BANK = "memory_bank"
_DROPOUT = 0.9  # a constant of the official code, not in its config


def read(path: Path, overrides: Sequence[str], track: Track) -> Checkpoint:
    """Opens an official directory, or a state-dict file with its config.json beside it.

    Raises UserError with all that is missing, unknown, mis-shaped, not finite, or unlike its alias.
    """
    directory = path if path.is_dir() else path.parent
    file = path / "state_dict.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the official state dict")
    if path.is_dir():  # a file that the user names may be a link
        resolve_inside(directory, file.name)
    config = _config_of(directory / "config.json", overrides)
    tensors = without_rope_tables(open_tensors(file, "state_dict"), config.model, file)
    shapes = abstract_params(config)
    table = official(config.model.tie_embeddings, _has_memory(shapes))
    bank = []
    if _has_memory(shapes):
        N, lanes = config.memory.num_slots, tensors[_BANK].shape[0] if _BANK in tensors else 1
        bank = [Entry(_BANK, None, _BANK, (), (lanes, N, N), False)]
    params = read_as_ours(table, tensors, shapes, config, bank, file, track)
    memory = tensors[_BANK].read().astype(np.float32) if bank else None
    return Checkpoint(config, params, memory, Origin(directory))


def write(checkpoint: Checkpoint, directory: Path, dtype: str, track: Track) -> None:
    """Writes an official directory. Raises UserError for a model that the official code has no place for."""
    config, with_memory = checkpoint.config, _has_memory(checkpoint.params)
    if config.model.window is not None:
        raise UserError(
            f"--to official: model.window {config.model.window}: attention of the official code sees one segment alone"
        )
    table = official(config.model.tie_embeddings, with_memory)
    named = dict(as_theirs(table, checkpoint, dtype, track))
    if with_memory:
        bank_BNN = np.eye(config.memory.num_slots, dtype=np.float32)[None]
        named[_BANK] = bank_BNN if checkpoint.memory is None else checkpoint.memory
    write_tensors(directory, "state_dict", named.items(), shard_bytes=1 << 62)  # one file: no index is read
    lanes = len(named[_BANK]) if with_memory else carried(checkpoint, ("batch_size",)).get("batch_size", 1)
    text = json.dumps(_config_for(checkpoint, lanes, with_memory), indent=1)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _has_memory(params: Any) -> bool:
    return any("/memory/" in path for path in params)


def _config_of(path: Path, overrides: Sequence[str]) -> Config:
    theirs = read_json(path)
    problems: list[str] = []
    values = from_llama(theirs, problems)
    with_memory = theirs.get("use_memory", False)
    if not isinstance(with_memory, bool):
        problems.append(f"use_memory: found {short_repr(with_memory)}; expected true or false")
    slots = number(theirs, "memory_slots", problems, default=16)
    T = number(theirs, "seq_len", problems, default=slots if with_memory else 2048)
    values["data"] |= {"segment_length": T, "segments_per_window": number(theirs, "segments", problems, default=1)}
    values["memory"] = {"kind": "none"}
    if with_memory:
        heads = number(theirs, "num_mem_heads", problems, default=4)
        values["memory"] = {"kind": "official", "num_slots": slots, "num_heads": heads, "dropout": _DROPOUT}
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return parse_config(json.dumps(values), overrides, where=str(path))


def _config_for(checkpoint: Checkpoint, lanes: int, with_memory: bool) -> dict[str, Any]:
    config = checkpoint.config
    values = to_llama(config) | {"max_position_embeddings": config.trained_segment_length, "loss_ignore_index": -100}
    values |= carried(checkpoint, ("max_position_embeddings", "loss_ignore_index"))
    if values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]:
        del values["head_dim"]
    return values | {
        "use_memory": with_memory,
        "memory_slots": config.memory.num_slots,
        "num_mem_heads": config.memory.num_heads,
        "batch_size": lanes,
        "seq_len": config.trained_segment_length,
        "segments": config.data.segments_per_window,
        "model_type": "llama",
    }
