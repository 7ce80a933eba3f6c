"""The programs of a run, lowered for a mesh of devices that need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lm2_jax.batch import Batch
from lm2_jax.config import Config
from lm2_jax.decoding import placement, sampling
from lm2_jax.model import build_model
from lm2_jax.model.decode import by_layer
from lm2_jax.model.sizes import count_parameters
from lm2_jax.parallel.mesh import abstract_batch, make_mesh, use_mesh
from lm2_jax.training.state import StepConfig, abstract_state
from lm2_jax.training.step import make_train_step


class Programs:
    """The programs of one config; `model.vocab_size` must be set."""

    def __init__(self, config: Config, devices: Sequence[Any]) -> None:
        """Raises UserError if the mesh does not fit the devices."""
        self.config = config
        self.mesh = make_mesh(config, devices)
        self.model = build_model(config)
        self._settings = StepConfig.of(config)
        with use_mesh(self.mesh):
            self.state = abstract_state(self.model, self.mesh, self._settings)
        self.parameters = count_parameters(self.state.all_params)
        self.frozen = count_parameters(self.state.frozen)

    def abstract_batch(self) -> Batch:
        """Shapes and shardings of a window of the last stage."""
        stage, data = self.config.stages[-1], self.config.data
        packed = data.boundaries == "packed"
        return abstract_batch(self.mesh, data.batch_size, stage.segments, stage.segment_length, packed)

    def lower_train_step(self) -> tuple[jax.stages.Lowered, int, Mesh]:
        """The step of the last stage, its tokens and its mesh."""
        batch = self.abstract_batch()
        with use_mesh(self.mesh):
            lowered = make_train_step(self.model, self.mesh, self._settings).lower(self.state, batch)
        return lowered, batch.tokens_BST.size, self.mesh

    def lower_decode_step(self) -> tuple[jax.stages.Lowered, int, Mesh]:
        """One token for each of data.batch_size rows in the middle of a segment, on decoding's own mesh."""
        rows, T = self.config.data.batch_size, self.config.trained_segment_length
        mesh = placement.decode_mesh(self.model, list(self.mesh.devices.flat))

        def lay_out(shapes: Any, shardings: Any) -> Any:
            return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

        params = jax.eval_shape(lambda params: by_layer(self.model, params), self.model.abstract_params())
        params = lay_out(params, placement.weight_shardings(self.model, mesh))
        state = jax.eval_shape(lambda params: sampling.initial_state(self.model, params, rows, T), params)
        specs = placement.state_specs(self.model, mesh, state)
        state = lay_out(state, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        tokens_BQ, count_B = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 1), (rows,)))
        with use_mesh(mesh):
            return sampling.append.lower(self.model, params, tokens_BQ, count_B, state), rows, mesh
