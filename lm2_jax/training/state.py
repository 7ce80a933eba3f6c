"""The train state, everything on the devices that a step reads and writes, and the settings that it depends on."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from lm2_jax.config import Config, OptimConfig
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.trained import join_params, split_params, trained_names
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
      frozen_dtype: of the parameters that optim.train leaves out.
    """

    optim: OptimConfig
    batch_size: int
    steps: int
    seed: int
    schedule: Schedule
    frozen_dtype: str

    @classmethod
    def of(cls, config: Config) -> StepConfig:
        """The settings of a run."""
        train = config.train
        return cls(config.optim, config.data.batch_size, train.steps, train.seed, train.schedule, train.frozen_dtype)


@chex.dataclass(frozen=True)
class TrainState:
    """A pytree; never changed, only replaced.

    Attributes:
      step: int32, windows trained on so far (skipped ones included).
      params: the trained parameters, float32.
      frozen: the other parameters, in train.frozen_dtype; {} where all are trained.
      opt_state: optax state of the trained parameters.
      memory: the lanes' memory after the last window, no gradient.
      skipped: int32, steps without an update because something was not finite.
      skipped_in_a_row: int32, of those, the ones since the last good step.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any
    memory: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def all_params(self) -> Any:
        """The tree under "params": trained and frozen parameters (or their shardings)."""
        return join_params(self.params, self.frozen)

    def with_params(self, all_params: Any) -> TrainState:
        """The state with other parameters, trained and frozen ones in the types and places that they have here."""
        trained, frozen = split_params(all_params, flatten_dict(self.params, sep="/").keys())

        def place(new: jax.Array, old: jax.Array) -> jax.Array:
            return jax.device_put(new.astype(old.dtype), old.sharding)

        return self.replace(
            params=jax.tree.map(place, trained, self.params), frozen=jax.tree.map(place, frozen, self.frozen)
        )


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
    trained, frozen = split_params(boxed, trained_names(model, settings.optim.train))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=trained,
        frozen=jax.tree.map(lambda x: x.astype(settings.frozen_dtype), frozen),
        opt_state=make_optimizer(settings.optim).init(trained),
        memory=model.init_memory(settings.batch_size, unbox(boxed)),
        skipped=zero,
        skipped_in_a_row=zero,
    )
