"""The train state, everything on the devices that a step reads and writes, and the settings that it depends on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lm2_jax.config import Config, OptimConfig
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import state_shardings, unbox
from lm2_jax.segments import Schedule
from lm2_jax.training.optim import make_optimizer


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings that the state and the jitted steps depend on, besides the model and the mesh.

    Attributes:
      optim: optimizer and objective.
      batch_size: B, lanes over all devices.
      steps: of the whole run; the learning rate decays towards them.
      seed: of the initial weights and of dropout.
      schedule: order of the double loop over segments and layers.
    """

    optim: OptimConfig
    batch_size: int
    steps: int
    seed: int
    schedule: Schedule

    @classmethod
    def of(cls, config: Config) -> StepConfig:
        """The settings of a run."""
        train = config.train
        return cls(config.optim, config.data.batch_size, train.steps, train.seed, train.schedule)


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


def create_state(model: Decoder, mesh: Mesh, settings: StepConfig) -> TrainState:
    """A fresh state, every array made where it will live: abstract -> shardings -> jitted init."""
    return _make_init(model, mesh, settings)(jax.random.key(settings.seed))


def abstract_state(model: Decoder, mesh: Mesh, settings: StepConfig) -> TrainState:
    """Shapes with their shardings of `create_state`'s arrays; the mesh's devices need not be there."""

    def shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract = unbox(_abstract_boxed_state(model, settings))
    return jax.tree.map(shape, abstract, shardings_of(model, mesh, settings))


@functools.cache
def shardings_of(model: Decoder, mesh: Mesh, settings: StepConfig) -> TrainState:
    """The sharding of every array of the state."""
    return state_shardings(mesh, _abstract_boxed_state(model, settings), model.lane_axis)


@functools.cache
def _make_init(model: Decoder, mesh: Mesh, settings: StepConfig) -> Any:
    shardings = shardings_of(model, mesh, settings)
    return jax.jit(lambda key: unbox(_boxed_state(model, settings, key)), out_shardings=shardings)


def _abstract_boxed_state(model: Decoder, settings: StepConfig) -> TrainState:
    return jax.eval_shape(lambda: _boxed_state(model, settings, jax.random.key(0)))


def _boxed_state(model: Decoder, settings: StepConfig, key: jax.Array) -> TrainState:
    """The state with its arrays boxed with logical axes."""
    boxed = model.init_params(key, with_axes=True)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=boxed,
        opt_state=make_optimizer(settings.optim).init(boxed),
        memory=model.init_memory(settings.batch_size, unbox(boxed)),
        skipped=zero,
        skipped_in_a_row=zero,
    )
