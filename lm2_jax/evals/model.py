"""A trained model ready to be evaluated: placed over the mesh, with its tokenizer and settings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import Config, dump_config, parse_config, replace
from lm2_jax.decoding.placement import prepare
from lm2_jax.loading import load_run
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import batch_sharding, boxed_shardings, make_mesh, memory_shardings, replicated
from lm2_jax.tokenizer import Origin, Tokenizer, load_text_tokenizer, origin_of_model

# (memory, inputs) -> (results, memory)
Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class EvalModel:
    """A model, its settings and its mesh, as every evaluation needs them; run it within `use_mesh(mesh)`.

    Attributes:
      checkpoint: the path it was loaded from.
      config: the run's settings with those of `--set`; data.batch_size lanes are read together.
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
        """The model's tokenizer. Raises UserError if it has none for text."""
        return load_text_tokenizer(self.config, self.checkpoint)

    @property
    def origin(self) -> Origin | None:
        """The small files of the pretrained model that this one began as, such as its chat template."""
        return origin_of_model(self.config.tokenizer, self.checkpoint)

    @functools.cached_property
    def decoding_params(self) -> Any:
        """The parameters as decoding reads them fastest."""
        return prepare(self.model, self.params)

    def fresh_memory(self) -> Any:
        """The memory of data.batch_size lanes that have read nothing."""
        return jax.jit(self._init_memory, out_shardings=self._memory_shardings)(self.params)

    def jit(self, step: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Step:
        """Compiles step(params, memory, inputs) -> (results, memory), and binds it to the parameters.

        Inputs are arrays [B, ...], spread over the lanes of the mesh; results are whole on every device.
        """
        params = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        jitted = jax.jit(
            step,
            in_shardings=(params, self._memory_shardings, batch_sharding(self.mesh)),
            out_shardings=(replicated(self.mesh), self._memory_shardings),
        )
        return functools.partial(jitted, self.params)

    def _init_memory(self, params: Any) -> Any:
        return self.model.init_memory(self.config.data.batch_size, params)

    @functools.cached_property
    def _memory_shardings(self) -> Any:
        memory = jax.eval_shape(self._init_memory, self.params)
        return memory_shardings(self.mesh, memory, self.model.lane_axis)


def load_for_evaluation(checkpoint: str | AnyPath, overrides: Sequence[str] = ()) -> EvalModel:
    """Loads a run directory, one of its checkpoints, or a converted directory.

    overrides: settings "a.b=c"; those of the sections model and memory cannot be changed.
    Raises UserError as `load_run` and `parse_config` do, for overrides of model or memory, if the lanes do not divide
    over the mesh, and in one of several processes.
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
    config = replace(config, optim={"accumulation_steps": 1})  # a setting of training; all lanes are read together
    model, mesh = build_model(config), make_mesh(config)

    fingerprint = hashlib.sha256(repr(array_checksums(params)).encode()).hexdigest()[:16]
    params = jax.device_put(params, boxed_shardings(mesh, model.abstract_params(with_axes=True)))
    return EvalModel(str(checkpoint), config, model, params, mesh, fingerprint)
