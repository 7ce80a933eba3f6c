"""Adapters: what a run trained of a model, without the Llama that stayed as it was.

adapter_model.safetensors holds what was trained and what no Llama has, by the names of the table `adapter`. With
low-rank additions to a plain Llama alone, the directory is PEFT's. With anything else it is ours: the config.json of
the whole model with a section `adapter`, and the modelling code, whose `LM2ForCausalLM.from_adapter` puts it onto the
base.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import read_json, short_repr
from lm2_jax.config import Config, replace
from lm2_jax.convert import tables
from lm2_jax.convert.engine import (
    DTYPES,
    Checkpoint,
    Track,
    abstract_params,
    as_theirs,
    check_names,
    entries,
    merged,
    table_key,
    their_tensors,
)
from lm2_jax.convert.huggingface import copy_code, lm2_config, lm2_params, lm2_settings, start_bank, write_json
from lm2_jax.convert.llama_config import number
from lm2_jax.convert.model_card import hub_name, write_adapter_card
from lm2_jax.convert.peft_config import PREFIX, from_peft, to_peft
from lm2_jax.convert.tensors import Tensor, open_tensors, write_tensors
from lm2_jax.model import build_model
from lm2_jax.model.lora import A, B, is_addition, weight_of
from lm2_jax.model.trained import trained_names

_STEM = "adapter_model"
_OURS, _PEFT = "config.json", "adapter_config.json"
_EVERY_TARGET = ("attention", "mlp", "embedding")


def format_of(base: Path) -> str:
    """The format of the Llama that an adapter goes onto, as convert_checkpoint names them."""
    return "gguf" if base.is_file() else "huggingface" if (base / "config.json").is_file() else "lm2_jax"


# --- Writing -------------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, directory: Path, dtype: str, track: Track) -> int:
    """Writes the adapter of a checkpoint whose low-rank additions are not merged. Returns its number of parameters.

    Raises UserError if no parameter of the Llama stayed as it was, or if PEFT would add something twice.
    """
    config = checkpoint.config
    own = _not_in_base(checkpoint)
    frozen = {p: t for p, t in checkpoint.params.items() if p not in own and not is_addition(p)}
    if not frozen:
        raise UserError(
            f"--to adapter: optim.train {list(config.optim.train)} trained all of the model, so that no base is left; "
            "export it whole (--to huggingface)"
        )
    part = dataclasses.replace(checkpoint, params=own)
    base = hub_name(checkpoint.origin) or config.train.init_from
    tied = config.model.tie_embeddings
    tensors = as_theirs(tables.adapter(tied), part, dtype, track)
    with_code = config.model.window is not None or not all(map(is_addition, own))
    if with_code:
        rest = dataclasses.replace(checkpoint, params=frozen)
        about = {"base": base, "base_sha256": _digest(their_tensors(tables.llama(tied), rest))}
        lora = config.model.lora
        about |= {"lora_rank": lora.rank, "lora_alpha": lora.alpha} if lora else {}
        write_json(lm2_settings(checkpoint, dtype) | {"adapter": about}, directory / _OURS)
        write_tensors(directory, _STEM, itertools.chain(tensors, start_bank(checkpoint)))
        copy_code(directory)
    else:
        _refuse_tied(config, own)
        names = [entry.name for entry in entries(tables.adapter(tied), own, config)]
        write_json(to_peft(config.model.lora, names, base), directory / _PEFT)
        write_tensors(directory, _STEM, ((PREFIX + name, array) for name, array in tensors))
    write_adapter_card(part, directory, base, with_code)
    return sum(tensor.size for tensor in own.values())


def _not_in_base(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Parameters that were trained or that no Llama has; of the additions those that were trained or are not zero."""
    config, params = checkpoint.config, checkpoint.params
    trained = trained_names(build_model(config), config.optim.train)
    in_llama = tables.llama(config.model.tie_embeddings).rules

    def adds(path: str) -> bool:
        pair = [weight_of(path) + end for end in (A, B)]
        return not trained.isdisjoint(pair) or all(np.any(params[half].read()) for half in pair)

    return {
        path: tensor
        for path, tensor in params.items()
        if path in trained or (adds(path) if is_addition(path) else table_key(path) not in in_llama)
    }


def _refuse_tied(config: Config, own: Mapping[str, Tensor]) -> None:
    if config.model.tie_embeddings and "embedding" + A in own:
        raise UserError(
            "--to adapter: model.lora.targets embedding, whose table is the head, too (model.tie_embeddings): PEFT "
            "would add to it twice when it merges; export the whole model (--to huggingface)"
        )


# --- Reading -------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """An adapter's directory.

    Attributes:
      config: of the whole model, with every addition that there may be.
      tensors: by the names of the table `adapter`.
      base: name or path of the model that it was trained on, if it is known.
      base_sha256: the digest of the parameters that it does not hold; None in PEFT's directories.
    """

    config: Config
    tensors: Mapping[str, Tensor]
    base: str | None = None
    base_sha256: str | None = None


def read(path: Path, base: Checkpoint, base_path: Path, track: Track) -> Checkpoint:
    """The whole model of an adapter and its base, its low-rank additions beside its weights.

    Raises UserError with everything that does not fit.
    """
    base = merged(base)
    llama = tables.llama(base.config.model.tie_embeddings)
    if strange := sorted(name for name in base.params if table_key(name) not in llama.rules):
        raise UserError(f"--base: {base_path} is no Llama alone; found {', '.join(strange)}")
    found = (_open_peft if (path / _PEFT).is_file() else _open_ours)(path, base.config)
    config, table = found.config, tables.adapter(found.config.model.tie_embeddings)
    shapes = _shapes(found)
    frozen = {name: t for name, t in their_tensors(llama, base).items() if name not in found.tensors}
    in_llama = {name: shape for name, shape in shapes.items() if table_key(name) in tables.llama(False).rules}
    wanted = [entry for entry in entries(table, in_llama, config) if entry.name not in found.tensors]
    check_names(wanted, frozen, table, base_path)
    params, memory = lm2_params(config, shapes, {**frozen, **found.tensors}, table, path, track)
    if found.base_sha256 not in (None, _digest(frozen)):
        raise UserError(
            f"--base: {base_path} has other weights than the model that {path} was trained on; expected those of "
            f"{short_repr(found.base)}"
        )
    return Checkpoint(config, params, memory, base.origin)


def _open_ours(path: Path, base: Config) -> Adapter:
    theirs, problems = read_json(path / _OURS), []
    about = theirs.get("adapter")
    if not isinstance(about, dict) or not isinstance(about.get("base_sha256"), str):
        raise UserError(f"{path / _OURS}: adapter: found {short_repr(about)}; expected what --to adapter writes there")
    config = lm2_config(path, theirs)
    data = base.data.model_dump() | {"segment_length": config.data.segment_length}
    config = replace(config, tokenizer=base.tokenizer.model_dump(), data=data)
    if "lora_rank" in about:
        lora = {"rank": number(about, "lora_rank", problems), "alpha": number(about, "lora_alpha", problems)}
        config = _with_additions(config, lora, path / _OURS, problems)
    return Adapter(config, open_tensors(path, _STEM), about.get("base"), about["base_sha256"])


def _open_peft(path: Path, base: Config) -> Adapter:
    theirs, problems = read_json(path / _PEFT), []
    config = _with_additions(base, from_peft(theirs, problems), path / _PEFT, problems)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in open_tensors(path, _STEM).items()}
    return Adapter(config, tensors, theirs.get("base_model_name_or_path"))


def _with_additions(config: Config, lora: dict[str, Any], where: Path, problems: list[str]) -> Config:
    """The config with additions to all weights that can have them."""
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    head = () if config.model.tie_embeddings else ("head",)
    return replace(config, model={"lora": {**lora, "targets": (*_EVERY_TARGET, *head)}})


def _shapes(found: Adapter) -> dict[str, Any]:
    """Shapes of the whole model's parameters, and of those additions that the adapter holds something of."""
    shapes, table = abstract_params(found.config), tables.adapter(found.config.model.tie_embeddings)
    there = {entry.path for entry in entries(table, shapes, found.config) if entry.name in found.tensors}
    added = {weight_of(path) for path in there if is_addition(path)}
    return {path: shape for path, shape in shapes.items() if not is_addition(path) or weight_of(path) in added}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors as bfloat16 has them: the same for a base in float32 and in bfloat16."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].read().astype(DTYPES["bfloat16"]).tobytes())
    return found.hexdigest()
