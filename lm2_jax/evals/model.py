"""A trained model ready to be evaluated: placed over the mesh, with its tokenizer and settings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm2_jax.checkpoint.manager import array_checksums
from lm2_jax.common.errors import UserError
from lm2_jax.config import Config, dump_config, parse_config, replace
from lm2_jax.loading import load_run
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import boxed_shardings, make_mesh
from lm2_jax.tokenizer import Tokenizer, load_text_tokenizer


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """What every evaluation starts from; run it within `use_mesh(mesh)`.

    Attributes:
      checkpoint: the path it was loaded from.
      config: the run's settings with those of `--set`; data.batch_size lanes are read at once.
      params: sharded over the mesh.
      fingerprint: 16 hex digits that change with any parameter.
    """

    checkpoint: str
    config: Config
    model: Decoder
    params: Any
    mesh: Mesh
    fingerprint: str

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the model. Raises UserError if it has none for text."""
        return load_text_tokenizer(self.config, self.checkpoint)


def load_for_evaluation(checkpoint: str | Path, overrides: Sequence[str] = ()) -> EvalModel:
    """Loads a run directory, one of its checkpoints, or a converted directory.

    overrides: settings "a.b=c"; any but those that make the model another one.
    Raises UserError as `load` and `parse_config` do, for such overrides, if the lanes do not divide over the mesh, and
    in one of several processes.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"evaluation runs in one process, over all of its devices; this is one of {jax.process_count()}"
        )
    trained, _, params = load_run(checkpoint)
    config = parse_config(dump_config(trained), overrides, where=str(checkpoint))
    for section in ("model", "memory"):
        if getattr(config, section) != getattr(trained, section):
            raise UserError(f"--set {section}...: the checkpoint's {section} cannot be set; leave it as it was trained")
    config = replace(config, optim={"accumulation_steps": 1})  # of training; lanes are read all at once
    model, mesh = build_model(config), make_mesh(config)

    fingerprint = hashlib.sha256(repr(array_checksums(params)).encode()).hexdigest()[:16]
    params = jax.device_put(params, boxed_shardings(mesh, model.abstract_params(with_axes=True)))
    return EvalModel(str(checkpoint), config, model, params, mesh, fingerprint)
