"""How large a model is, and the model of a given size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm2_jax.config import Config, MemoryConfig, ModelConfig, replace
from lm2_jax.model import build_model


def parameters(config: Config) -> int:
    """How many a model has; `model.vocab_size` must be set."""
    return _parameters(config.model, config.memory)


@functools.cache
def _parameters(model_config: ModelConfig, memory_config: MemoryConfig) -> int:
    model = build_model(Config(model=model_config, memory=memory_config))

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, 1), jnp.int32), model.init_memory(1))["params"]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))


def with_parameters(config: Config, count: int, multiple: int = 1) -> Config:
    """The config with the width of the feed-forward layers at which the model has nearest to `count` parameters.

    A width that has to change becomes a multiple of `multiple`. Raises ValueError where it has more without any.
    """
    missing = count - parameters(config)
    d_ff = config.model.d_ff + round(missing / (3 * config.model.d_model * config.model.num_layers))
    if d_ff != config.model.d_ff:
        d_ff = round(d_ff / multiple) * multiple
    if d_ff < 1:
        raise ValueError(f"{parameters(config):,} parameters cannot be made {count:,} by narrower feed-forward layers")
    return replace(config, model={"d_ff": d_ff})


def memory_size(config: Config) -> int:
    """Numbers that a lane's memory holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(build_model(config).init_memory(1)))
