"""AdamW or Muon with a decay mask, global-norm clipping, and the learning-rate schedule."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from packaging.version import Version

from lm2_jax.config import OptimConfig
from lm2_jax.model.decoder import STACKS
from lm2_jax.model.lora import is_addition

_UNDECAYED = ("embedding", "memory_tokens")
_RMS_OF_ADAM = 0.2  # approximate root mean square of Adam's updates (arXiv 2502.16982)
_MUON_IS_WIDENED = Version(optax.__version__) < Version("0.2.8")  # multiplies its steps by sqrt(max(1, out / in))


@functools.cache
def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping, Adam or Muon, decoupled decay; its updates times the learning rate are subtracted from the weights."""
    scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.kind == "muon":
        scale = optax.partition({"muon": _scale_by_muon(), "adam": scale}, _muon_or_adam)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def _scale_by_muon() -> optax.GradientTransformation:
    """Turns stacked matrices [L,in,out] into the nearest orthogonal ones, at the size of Adam's updates."""

    def matrices(updates: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), updates)

    def resize(updates: Any, _: Any) -> Any:
        def factor(fan_in: int, fan_out: int) -> float:
            widened = max(1.0, fan_out / fan_in) ** 0.5 if _MUON_IS_WIDENED else 1.0
            return _RMS_OF_ADAM * max(fan_in, fan_out) ** 0.5 / widened

        return jax.tree.map(lambda x: x * factor(*x.shape[1:]), updates)

    return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=matrices), optax.stateless(resize))


def _muon_or_adam(params: Any) -> Any:
    """Labels parameters: Muon for the matrices of attention and feed-forward layers, Adam for all else."""

    def label(path: tuple, array: jax.Array) -> str:
        names, rank = _names_and_rank(path, array)
        of_llama = not {"attention", "mlp"}.isdisjoint(names)
        return "muon" if rank == 2 and of_llama and not is_addition(names[-1]) else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def decay_mask(params: Any) -> Any:
    """True for matrices; False for norms, biases, the embedding and learned memory tokens."""

    def decays(path: tuple, array: jax.Array) -> bool:
        names, rank = _names_and_rank(path, array)
        return rank >= 2 and names[-1] not in _UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def _names_and_rank(path: tuple, array: jax.Array) -> tuple[list[str], int]:
    """A parameter's names from the outside in, and its rank without the layer axis of stacked blocks."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names, array.ndim - any(name in STACKS for name in names)


def learning_rate(config: OptimConfig, steps: int, step: jax.Array) -> jax.Array:
    """Learning rate of 0-based `step` of a run of `steps`.

    Linear warm-up, then: constant; cosine down to final_fraction; or linear: constant, and straight down to
    final_fraction over the last decay_fraction of the steps.
    """
    warmup = (step + 1) / max(config.warmup_steps, 1)
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        shape = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
    elif config.schedule == "linear":
        shape = jnp.clip((steps - step) / max(config.decay_fraction * steps, 1), 0, 1)
    else:
        shape = 1.0
    level = config.final_fraction + (1 - config.final_fraction) * shape
    return config.learning_rate * jnp.minimum(warmup, level)
