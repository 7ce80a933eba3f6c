"""The programs of a run, lowered for a mesh of devices that need not be there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm2_jax.config import Config
from lm2_jax.decoding import sampling
from lm2_jax.model import build_model
from lm2_jax.parallel.mesh import batch_sharding, make_mesh, memory_shardings, use_mesh
from lm2_jax.training.optim import make_optimizer
from lm2_jax.training.state import abstract_state
from lm2_jax.training.step import abstract_batch, make_train_step


class Programs:
    """Of one config; `model.vocab_size` must be set."""

    def __init__(self, config: Config, devices: Sequence[Any]) -> None:
        """Raises UserError if the mesh does not fit the devices."""
        self.config = config
        self.mesh = make_mesh(config, devices)
        self.model = build_model(config)
        self._optimizer = make_optimizer(config.optim)
        with use_mesh(self.mesh):
            batch_size = config.data.batch_size
            self.state, self.shardings = abstract_state(self.model, self._optimizer, self.mesh, batch_size)
        self.parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state.params))

    def lower_train_step(self) -> tuple[jax.stages.Lowered, int]:
        """The step of the last stage, and its tokens."""
        stage, batch_size = self.config.stages[-1], self.config.data.batch_size
        with use_mesh(self.mesh):
            step = make_train_step(self.model, self._optimizer, self.mesh, self.shardings)
            lowered = step.lower(self.state, abstract_batch(self.mesh, batch_size, stage))
        return lowered, batch_size * stage.segments * stage.segment_length

    def lower_decode_step(self) -> tuple[jax.stages.Lowered, int]:
        """One token for each of data.batch_size rows in the middle of a segment."""
        rows, T = self.config.data.batch_size, self.config.trained_segment_length

        def lanes(x: jax.ShapeDtypeStruct, lane_axis: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=memory_shardings(self.mesh, x, lane_axis))

        with use_mesh(self.mesh):
            state = jax.eval_shape(lambda params: sampling.start(self.model, params, rows, T), self.state.params)
            state = jax.tree.map(lambda x: lanes(x, 1 if x.ndim > 1 else 0), state)
            if self.model.kind.lane_axis == 0:
                state = state.replace(memory=jax.tree.map(lambda x: lanes(x, 0), state.memory))
            rows_sharding = batch_sharding(self.mesh)
            tokens_BQ = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=rows_sharding)
            count_B = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=rows_sharding)
            return sampling.extend.lower(self.model, self.state.params, tokens_BQ, count_B, state), rows
