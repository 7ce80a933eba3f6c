"""The programs of a run, lowered for a mesh of devices that need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm2_jax.batch import Batch
from lm2_jax.config import Config
from lm2_jax.decoding import sampling
from lm2_jax.model import build_model
from lm2_jax.model.sizes import count_parameters
from lm2_jax.parallel.mesh import abstract_batch, batch_sharding, make_mesh, memory_shardings, use_mesh
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
        self.parameters = count_parameters(self.state.params)

    def abstract_batch(self) -> Batch:
        """Shapes and shardings of a window of the last stage."""
        stage, data = self.config.stages[-1], self.config.data
        packed = data.boundaries == "packed"
        return abstract_batch(self.mesh, data.batch_size, stage.segments, stage.segment_length, packed)

    def lower_train_step(self) -> tuple[jax.stages.Lowered, int]:
        """The step of the last stage, and its tokens."""
        batch = self.abstract_batch()
        with use_mesh(self.mesh):
            lowered = make_train_step(self.model, self.mesh, self._settings).lower(self.state, batch)
        return lowered, batch.tokens_BST.size

    def lower_decode_step(self) -> tuple[jax.stages.Lowered, int]:
        """One token for each of data.batch_size rows in the middle of a segment."""
        rows, T = self.config.data.batch_size, self.config.trained_segment_length

        def lanes(x: jax.ShapeDtypeStruct, lane_axis: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=memory_shardings(self.mesh, x, lane_axis))

        with use_mesh(self.mesh):
            state = jax.eval_shape(lambda params: sampling.start(self.model, params, rows, T), self.state.params)
            state = jax.tree.map(lambda x: lanes(x, 1 if x.ndim > 1 else 0), state)
            if self.model.lane_axis == 0:
                state = state.replace(memory=jax.tree.map(lambda x: lanes(x, 0), state.memory))
            rows_sharding = batch_sharding(self.mesh)
            tokens_BQ = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=rows_sharding)
            count_B = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=rows_sharding)
            return sampling.append.lower(self.model, self.state.params, tokens_BQ, count_B, state), rows
