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


def validate(config: Config, model: Decoder, pipeline: Pipeline, mesh: Mesh, params: Any, stage: StageConfig) -> Record:
    """Mean negative log-likelihood (nats a token), and accuracy where there are answers; {} without documents.

    The documents are read in a fresh memory: training's is never touched.
    """
    lanes, settings = pipeline.validation(stage), StepConfig.of(config)
    if lanes is None:
        return {}
    eval_step = make_eval_step(model, mesh, settings)
    sums, memory, windows = LossSums.zero(), make_fresh_memory(model, mesh, settings)(params), iter(lanes)
    for _ in range(config.eval.windows):
        batch = to_devices(mesh, config.data.batch_size, next(windows))
        here, memory = eval_step(params, memory, batch)
        sums = jax.tree.map(lambda a, b: a + b, sums, here)
    record = {"validation_loss": float(sums.nll) / max(int(sums.tokens), 1)}
    if int(sums.answers):
        record["validation_accuracy"] = int(sums.correct) / int(sums.answers)
    return record
