"""One training step and one validation step, as jitted functions with explicit shardings (today's pjit).

Axes: A microbatches, B lanes, S segments, T tokens. Every `make_` function is cached: runs with equal models, settings
and meshes share what is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lm2_jax.batch import Batch
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.memory.base import Memory
from lm2_jax.model.trained import join_params
from lm2_jax.parallel.mesh import batch_sharding, replicated
from lm2_jax.segments import run_batch
from lm2_jax.training.loss import LossSums, loss_weights, window_loss
from lm2_jax.training.optim import learning_rate, make_optimizer
from lm2_jax.training.state import StepConfig, TrainState, shardings_of

Metrics = dict[str, jax.Array]


@functools.cache
def make_train_step(
    model: Decoder, mesh: Mesh, settings: StepConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); it compiles once per window shape. The state is donated."""
    optimizer = make_optimizer(settings.optim)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums, gates, memory = _gradients(model, settings, state, batch)

        # Update, unless something is not finite; then the step only moves the lanes on
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(settings.optim, settings.steps, state.step)
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        memory = _restart_broken_lanes(model, state.all_params, memory)

        skipped = 1 - finite.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=params,
            frozen=state.frozen,
            opt_state=opt_state,
            memory=memory,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        metrics = {
            "loss": sums.loss,
            "nll": sums.nll / jnp.maximum(sums.tokens, 1),
            "tokens_in_step": jnp.sum(batch.document_BST > 0),
            "answers_in_step": sums.answers,
            "correct_in_step": sums.correct,
            "grad_norm": grad_norm,
            "lr": rate,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
            **memory_norms(model, memory),
            **{f"gate_{name}": value for name, value in gates.items()},
        }
        return state, metrics

    shardings = shardings_of(model, mesh, settings)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


@functools.cache
def make_eval_step(
    model: Decoder, mesh: Mesh, settings: StepConfig
) -> Callable[[Any, Memory, Batch], tuple[LossSums, Memory]]:
    """A jitted (params, memory, batch) -> (sums over the batch, memory); the caller's memory, never the training's."""

    def eval_step(params: Any, memory: Memory, batch: Batch) -> tuple[LossSums, Memory]:
        weights_BST = jnp.zeros(batch.tokens_BST.shape)
        outputs = run_batch(model, params, batch, memory, schedule=settings.schedule)
        return window_loss(model, params, outputs.hidden_BSTD, batch, weights_BST), outputs.memory

    shardings = shardings_of(model, mesh, settings)
    return jax.jit(
        eval_step,
        in_shardings=(shardings.all_params, shardings.memory, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), shardings.memory),
    )


@functools.cache
def make_fresh_memory(model: Decoder, mesh: Mesh, settings: StepConfig) -> Callable[[Any], Memory]:
    """A jitted params -> memory of settings.batch_size lanes, all at a document's start."""
    shardings = shardings_of(model, mesh, settings)
    return jax.jit(
        lambda params: model.init_memory(settings.batch_size, params),
        in_shardings=(shardings.all_params,),
        out_shardings=shardings.memory,
    )


def memory_norms(model: Decoder, memory: Memory) -> Metrics:
    """Mean and largest norm of a slot, over layers and lanes; nothing where there is no memory."""
    slots_LBNM = model.as_slots(memory)
    if slots_LBNM is None:
        return {}
    norm_LBN = jnp.linalg.norm(slots_LBNM, axis=-1)
    return {"memory_norm": jnp.mean(norm_LBN), "memory_norm_max": jnp.max(norm_LBN)}


def _gradients(
    model: Decoder, settings: StepConfig, state: TrainState, batch: Batch
) -> tuple[Any, LossSums, Metrics, Memory]:
    """Gradient of the objective, its sums, gate means and the memory after the batch, microbatch by microbatch."""
    # Weights of the global batch, so that microbatches and devices add up to one mean
    weights_BST = loss_weights(batch, settings.optim.lm_loss_weight)
    answers_only = settings.optim.lm_loss_weight == 0  # are projected to the vocabulary
    has_dropout = model.spec.memory.dropout
    step_key = jax.random.fold_in(jax.random.key(settings.seed), state.step) if has_dropout else None

    def gradient(
        memory: Memory, batch: Batch, weights_BST: jax.Array, dropout_key: jax.Array | None
    ) -> tuple[tuple[Any, LossSums, Metrics], Memory]:
        def objective(params: Any) -> tuple[jax.Array, tuple[LossSums, Memory, Metrics]]:
            all_params = join_params(params, state.frozen)
            outputs = run_batch(model, all_params, batch, memory, schedule=settings.schedule, dropout_key=dropout_key)
            sums = window_loss(model, all_params, outputs.hidden_BSTD, batch, weights_BST, answers_only)
            return sums.loss, (sums, outputs.memory, outputs.gates)

        grads, (sums, memory_after, gates) = jax.grad(objective, has_aux=True)(state.params)
        return (grads, sums, gates), memory_after

    microbatches, lane_axis = settings.optim.accumulation_steps, model.lane_axis
    if microbatches == 1:
        (grads, sums, gates), memory = gradient(state.memory, batch, weights_BST, step_key)
        return grads, sums, gates, memory

    def accumulate(totals: Any, part: tuple[Memory, Batch, jax.Array, Any]) -> tuple[Any, Memory]:
        here, memory = gradient(*part)
        return jax.tree.map(jnp.add, totals, here), memory

    by_microbatch = (
        _split_lanes(state.memory, microbatches, lane_axis),
        *_split_lanes((batch, weights_BST), microbatches, 0),
        None if step_key is None else jax.random.split(step_key, microbatches),
    )
    totals, _ = jax.eval_shape(gradient, *jax.tree.map(lambda a: a[0], by_microbatch))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), totals)
    (grads, sums, gates), memory = jax.lax.scan(accumulate, zeros, by_microbatch)
    return grads, sums, jax.tree.map(lambda g: g / microbatches, gates), _join_lanes(memory, lane_axis)


def _restart_broken_lanes(model: Decoder, params: Any, memory: Memory) -> Memory:
    """Restarts lanes whose memory is not finite: it would never become finite again."""
    leaves = jax.tree.leaves(memory)
    if not leaves:
        return memory
    lane_axis = model.lane_axis
    finite_B = jnp.stack(
        [jnp.all(jnp.isfinite(jnp.moveaxis(x, lane_axis, 0)), axis=range(1, x.ndim)) for x in leaves]
    ).all(axis=0)
    return model.select_lanes(finite_B, memory, model.init_memory(finite_B.shape[0], params))


def _split_lanes(tree: Any, count: int, lane_axis: int) -> Any:
    """Lanes [.., B, ..] to [A, .., B/A, ..]; neighbours go to different microbatches, so every device has a share."""

    def split(x: jax.Array) -> jax.Array:
        B = x.shape[lane_axis]
        x = x.reshape(*x.shape[:lane_axis], B // count, count, *x.shape[lane_axis + 1 :])
        return jnp.moveaxis(x, lane_axis + 1, 0)

    return jax.tree.map(split, tree)


def _join_lanes(tree: Any, lane_axis: int) -> Any:
    """Undoes `_split_lanes`."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, lane_axis + 1)
        return x.reshape(*x.shape[:lane_axis], -1, *x.shape[lane_axis + 2 :])

    return jax.tree.map(join, tree)
