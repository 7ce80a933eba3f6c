"""Validation while training: the loss on held-out documents."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from lm2_jax.common.records import Record
from lm2_jax.config import Config, StageConfig
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import to_devices
from lm2_jax.training.loss import LossSums
from lm2_jax.training.state import StepConfig
from lm2_jax.training.step import make_eval_step, make_fresh_memory


class Validation:
    """Measures held-out documents in a memory of its own: training's is never touched."""

    def __init__(self, config: Config, pipeline: Pipeline, model: Decoder, mesh: Mesh) -> None:
        self._config, self._pipeline, self._mesh = config, pipeline, mesh
        settings = StepConfig.of(config)
        self._eval_step = make_eval_step(model, mesh, settings)
        self._fresh_memory = make_fresh_memory(model, mesh, settings)

    def __call__(self, params: Any, stage: StageConfig) -> Record:
        """Mean negative log-likelihood (nats a token), and accuracy where there are answers; {} without documents."""
        lanes = self._pipeline.validation(stage)
        if lanes is None:
            return {}
        sums, memory, windows = LossSums.zero(), self._fresh_memory(params), iter(lanes)
        for _ in range(self._config.eval.windows):
            batch = to_devices(self._mesh, self._config.data.batch_size, next(windows))
            here, memory = self._eval_step(params, memory, batch)
            sums = jax.tree.map(lambda a, b: a + b, sums, here)
        record = {"validation_loss": float(sums.nll) / max(int(sums.tokens), 1)}
        if int(sums.answers):
            record["validation_accuracy"] = int(sums.correct) / int(sums.answers)
        return record
