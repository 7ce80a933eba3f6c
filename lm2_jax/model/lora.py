"""Low-rank additions to weights (LoRA, arXiv 2106.09685): W + alpha / rank · A B, where W need not be trained.

W [in,out] has A [in,r] and B [r,out] beside it, named `W_lora_a` and `W_lora_b`. One of them starts at zero, so that an
addition changes nothing until it is trained.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax

from lm2_jax.config import Config, LoraConfig, replace

A, B = "_lora_a", "_lora_b"  # ends of the names


class LowRank(NamedTuple):
    """A weight and its low-rank addition: weight + scale · a b.

    Attributes:
      weight: [in,out].
      a: [in,r].
      b: [r,out].
      scale: alpha / rank.
    """

    weight: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float

    def merged(self) -> jax.Array:
        """The sum, [in,out], in the weight's dtype."""
        return (self.weight + self.scale * (self.a @ self.b)).astype(self.weight.dtype)


Weight = jax.Array | LowRank


def with_addition(
    module: nn.Module, lora: LoraConfig | None, name: str, axes: tuple[str, str], weight: jax.Array
) -> Weight:
    """The module's weight `name` with its addition, whose parameters are made here; the weight alone without one."""
    if lora is None or name not in lora.weights:
        return weight
    (inputs, outputs), rank, zeros = weight.shape, lora.rank, nn.initializers.zeros
    random_a, random_b = (nn.initializers.normal(size**-0.5) for size in (inputs, outputs))
    a_init, b_init = (zeros, random_b) if axes[0] == "vocab" else (random_a, zeros)  # a table is looked up in A
    a = module.param(f"{name}{A}", nn.with_logical_partitioning(a_init, (axes[0], None)), (inputs, rank))
    b = module.param(f"{name}{B}", nn.with_logical_partitioning(b_init, (None, axes[1])), (rank, outputs))
    return LowRank(weight, a, b, lora.alpha / rank)


def is_addition(path: str) -> bool:
    """True for the path of a parameter that belongs to an addition."""
    return path.endswith((A, B))


def weight_of(path: str) -> str:
    """The path of the weight that a parameter of an addition belongs to."""
    return path.removesuffix(A).removesuffix(B)


def without(config: Config) -> Config:
    """The config of the same model once its additions are in its weights."""
    if config.model.lora is None:
        return config
    return replace(config, model={"lora": None}, optim={"train": ["all"]})
