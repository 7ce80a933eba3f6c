"""How large a model is, what its steps compute, and the model of a given size."""

from __future__ import annotations

from typing import Any

import jax

from lm2_jax.config import Config, replace
from lm2_jax.model import build_model


def parameters(config: Config) -> int:
    """Number of parameters; `model.vocab_size` must be set."""
    return count_parameters(build_model(config).abstract_params())


def count_parameters(params: Any) -> int:
    """Number of parameters in a tree of arrays, or of their shapes: the N of `model_flops`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def model_flops(parameters: int, tokens: int, training: bool = True) -> float:
    """FLOPs that a model needs for so many tokens, without recomputation: 6ND, or 2ND without a backward pass."""
    return (6.0 if training else 2.0) * parameters * tokens


def with_parameters(config: Config, count: int, multiple: int = 1) -> Config:
    """The config with the width of the feed-forward layers at which the model is nearest to `count` parameters.

    A width that has to change becomes a multiple of `multiple`. Raises ValueError where even none leaves too many.
    """
    missing = count - parameters(config)
    d_ff = config.model.d_ff + round(missing / (3 * config.model.d_model * config.model.num_layers))
    if d_ff != config.model.d_ff:
        d_ff = round(d_ff / multiple) * multiple
    if d_ff < 1:
        raise ValueError(f"{parameters(config):,} parameters cannot be made {count:,} by narrower feed-forward layers")
    return replace(config, model={"d_ff": d_ff})


def memory_size(config: Config) -> int:
    """Number of values that one lane's memory holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(build_model(config).init_memory(1)))
