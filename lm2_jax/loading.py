"""Loads a model for use: from a run directory, one of its checkpoints, or a converted directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lm2_jax.common.errors import UserError
from lm2_jax.config import load_config
from lm2_jax.convert import directory as converted
from lm2_jax.convert.engine import abstract_params, as_tree
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Decoder
from lm2_jax.training.checkpoint import DamagedError, array_checksums, first_line


def load(path: str | Path) -> tuple[Decoder, Any]:
    """The model and its parameters from a run directory (its newest checkpoint), one checkpoint, or a converted one.

    Returns the linen module and the tree under "params". Raises UserError if there is no readable checkpoint.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory, one of its checkpoints, or a converted one")
    if converted.is_converted(path):
        found = converted.read(path)
        return build_model(found.config), as_tree({p: jnp.asarray(t.read()) for p, t in found.params.items()})
    if (path / "config.yaml").is_file():
        steps = sorted((int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdigit()), reverse=True)
        if not steps:
            raise UserError(f"{path}: a run directory without a checkpoint")
        config = load_config(path / "config.yaml")
        path = path / "checkpoints" / str(steps[0])
    else:
        if not (path / "config" / "metadata").is_file():
            raise UserError(f"{path}: neither a run directory (no config.yaml) nor a checkpoint (no config)")
        config = load_config(path / "config" / "metadata")
    model = build_model(config)
    abstract = as_tree(abstract_params(config))
    on_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one), abstract)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / "params", abstract)
        saved = json.loads((path / "progress" / "metadata").read_text(encoding="utf-8"))["checksums"]
        if array_checksums(params) != saved[: len(jax.tree.leaves(params))]:
            raise DamagedError("parameters fail their checksums")
    except Exception as error:  # whatever Orbax or TensorStore make of damaged files
        raise UserError(f"{path}: the checkpoint cannot be read ({first_line(error)}); take an older one") from error
    return model, params


def load_memory(path: str | Path) -> Any:
    """The start memory that a converted directory carries (official: memory_bank [B,N,N]); None if it carries none."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    memory = converted.read(path).memory if converted.is_converted(path) else None
    return None if memory is None else jnp.asarray(memory)
