"""AdamW with a decay mask, global-norm clipping, and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm2_jax.config import OptimConfig

_UNDECAYED = ("embedding", "memory_tokens")


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay: gradients to the direction that is subtracted, times the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(params: Any) -> Any:
    """True for matrices; False for norms, biases, the embedding and learned memory tokens.

    Arrays inside the blocks have a leading layer axis, which is not counted.
    """

    def decays(path: tuple, array: jax.Array) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        rank = array.ndim - any(name in ("blocks", "bank_blocks") for name in names)
        return rank >= 2 and names[-1] not in _UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


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
