"""The train state: everything on the devices that a step reads and writes."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import state_shardings, unbox


@chex.dataclass(frozen=True)
class TrainState:
    """A pytree; never changed, only replaced.

    Attributes:
      step: int32, windows trained on so far (skipped ones included).
      params: float32 weights.
      opt_state: optax state.
      memory: the lanes' memory after the last window, no gradient.
      skipped: int32, steps without an update because something was not finite.
      skipped_in_a_row: int32, of those, the ones since the last good step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    memory: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def create_state(
    model: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, batch_size: int, seed: int
) -> tuple[TrainState, TrainState]:
    """A fresh state, every array made where it will live, and its shardings: abstract -> shardings -> jitted init."""
    make = functools.partial(_boxed_state, model, optimizer, batch_size)
    boxed = jax.eval_shape(make, jax.random.key(seed))
    shardings = state_shardings(mesh, boxed, model.kind.lane_axis)
    return jax.jit(lambda key: unbox(make(key)), out_shardings=shardings)(jax.random.key(seed)), shardings


def abstract_state(
    model: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, batch_size: int
) -> tuple[TrainState, TrainState]:
    """As `create_state`, shapes with their shardings instead of arrays; the mesh's devices need not be there."""
    boxed = jax.eval_shape(lambda: _boxed_state(model, optimizer, batch_size, jax.random.key(0)))
    shardings = state_shardings(mesh, boxed, model.kind.lane_axis)

    def shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, unbox(boxed), shardings), shardings


def _boxed_state(
    model: Decoder, optimizer: optax.GradientTransformation, batch_size: int, key: jax.Array
) -> TrainState:
    """Its arrays are boxed with logical axes."""
    tokens_BT = jnp.zeros((1, model.config.data.segment_length), jnp.int32)
    boxed = model.init_with_axes(key, tokens_BT, model.init_memory(1))["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=boxed,
        opt_state=optimizer.init(boxed),
        memory=model.init_memory(batch_size, unbox(boxed)),
        skipped=zero,
        skipped_in_a_row=zero,
    )
