"""One training step and one validation step, as jitted functions with explicit shardings (today's pjit).

Axes: A microbatches, B lanes, S segments, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lm2_jax.config import StageConfig
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.memory.base import Memory
from lm2_jax.parallel.mesh import batch_sharding, replicated
from lm2_jax.segments import run_window
from lm2_jax.training.loss import Batch, LossSums, loss_weights, window_loss
from lm2_jax.training.optim import learning_rate
from lm2_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    model: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, shardings: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); it compiles once per window shape. The state is donated."""
    config, lane_axis = model.config, model.kind.lane_axis
    microbatches = config.optim.accumulation_steps

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Weights of the global batch, so that microbatches and devices add up to one mean
        batch = {**batch, "weights_BST": loss_weights(batch, config.optim.lm_loss_weight)}
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step) if config.memory.dropout else None

        # Loss and gradient, microbatch by microbatch
        def gradient(
            memory: Memory, batch: Batch, dropout_key: jax.Array | None
        ) -> tuple[tuple[Any, LossSums, Metrics], Memory]:
            def objective(params: Any) -> tuple[jax.Array, tuple[LossSums, Memory, Metrics]]:
                sums, memory_after, gates = forward(model, params, memory, batch, batch["weights_BST"], dropout_key)
                return sums.loss, (sums, memory_after, gates)

            grads, (sums, memory_after, gates) = jax.grad(objective, has_aux=True)(state.params)
            return (grads, sums, gates), memory_after

        if microbatches == 1:
            (grads, sums, gates), memory = gradient(state.memory, batch, step_key)
        else:
            keys_A = None if step_key is None else jax.random.split(step_key, microbatches)
            parts = _split_lanes(state.memory, microbatches, lane_axis), _split_lanes(batch, microbatches, 0), keys_A

            def accumulate(totals: Any, part: tuple[Memory, Batch, Any]) -> tuple[Any, Memory]:
                here, memory = gradient(*part)
                return jax.tree.map(jnp.add, totals, here), memory

            totals, _ = jax.eval_shape(gradient, *jax.tree.map(lambda a: a[0], parts))
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), totals)
            (grads, sums, gates), memory = jax.lax.scan(accumulate, zeros, parts)
            memory = _join_lanes(memory, lane_axis)
            gates = jax.tree.map(lambda g: g / microbatches, gates)

        # Update, unless something is not finite; then the step only moves the lanes on
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(config.optim, config.train.steps, state.step)
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        memory = _restart_broken_lanes(model, params, memory)

        skipped = 1 - finite.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            memory=memory,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        metrics = {
            "loss": sums.loss,
            "nll": sums.nll / jnp.maximum(sums.tokens, 1),
            "tokens_in_step": sums.tokens,
            "answers_in_step": sums.answers,
            "correct_in_step": sums.correct,
            "grad_norm": grad_norm,
            "lr": rate,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
            **memory_norms(memory),
            **{f"gate_{name}": value for name, value in gates.items()},
        }
        return state, metrics

    batch_shardings = batch_sharding(mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_shardings),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def abstract_batch(mesh: Mesh, batch_size: int, stage: StageConfig) -> Batch:
    """Shapes and shardings of a batch of windows."""

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    by_segment = (batch_size, stage.segments)
    by_token = (*by_segment, stage.segment_length)
    batch = {name: array(by_token, jnp.int32) for name in ("tokens_BST", "targets_BST", "document_BST")}
    return batch | {"answers_BST": array(by_token, bool), "reset_BS": array(by_segment, bool)}


def make_eval_step(
    model: Decoder, mesh: Mesh, shardings: TrainState
) -> Callable[[Any, Memory, Batch], tuple[LossSums, Memory]]:
    """A jitted (params, memory, batch) -> (sums over the batch, memory); the caller's memory, never the training's."""

    def eval_step(params: Any, memory: Memory, batch: Batch) -> tuple[LossSums, Memory]:
        weights_BST = jnp.zeros(batch["tokens_BST"].shape)
        sums, memory, _ = forward(model, params, memory, batch, weights_BST)
        return sums, memory

    return jax.jit(
        eval_step,
        in_shardings=(shardings.params, shardings.memory, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), shardings.memory),
    )


def make_fresh_memory(model: Decoder, shardings: TrainState) -> Callable[[Any], Memory]:
    """A jitted params -> memory of data.batch_size lanes, all at a document's start."""
    return jax.jit(
        lambda params: model.init_memory(model.config.data.batch_size, params),
        in_shardings=(shardings.params,),
        out_shardings=shardings.memory,
    )


def forward(
    model: Decoder,
    params: Any,
    memory: Memory,
    batch: Batch,
    weights_BST: jax.Array,
    dropout_key: jax.Array | None = None,
) -> tuple[LossSums, Memory, Metrics]:
    """A window through the model and the loss: (sums, memory after the window, gate means). No key: no dropout."""
    hidden_BSTD, memory, gates = run_window(
        model,
        params,
        batch["tokens_BST"],
        memory,
        batch["reset_BS"],
        batch["document_BST"],
        model.config.train.schedule,
        packed=model.config.data.boundaries == "packed",
        dropout_key=dropout_key,
    )
    return window_loss(model, params, hidden_BSTD, batch, weights_BST), memory, gates


def memory_norms(memory: Memory) -> Metrics:
    """Mean and largest norm of a slot, over layers and lanes; nothing where there is no memory."""
    norms = [jnp.linalg.norm(leaf, axis=-1) for leaf in jax.tree.leaves(memory)]
    if not norms:
        return {}
    return {
        "memory_norm": jnp.mean(jnp.stack([jnp.mean(n) for n in norms])),
        "memory_norm_max": jnp.max(jnp.stack([jnp.max(n) for n in norms])),
    }


def _restart_broken_lanes(model: Decoder, params: Any, memory: Memory) -> Memory:
    """Lanes whose memory is not finite start afresh, or they would never become finite again."""
    leaves = jax.tree.leaves(memory)
    if not leaves:
        return memory
    lane_axis = model.kind.lane_axis
    finite_B = jnp.stack(
        [jnp.all(jnp.isfinite(jnp.moveaxis(x, lane_axis, 0)), axis=range(1, x.ndim)) for x in leaves]
    ).all(axis=0)
    return model.kind.select_lanes(finite_B, memory, model.init_memory(finite_B.shape[0], params))


def _split_lanes(tree: Any, parts: int, lane_axis: int) -> Any:
    """Lanes [.., B, ..] to [A, .., B/A, ..]; neighbours go to different microbatches, so every device has a share."""

    def split(x: jax.Array) -> jax.Array:
        B = x.shape[lane_axis]
        x = x.reshape(*x.shape[:lane_axis], B // parts, parts, *x.shape[lane_axis + 1 :])
        return jnp.moveaxis(x, lane_axis + 1, 0)

    return jax.tree.map(split, tree)


def _join_lanes(tree: Any, lane_axis: int) -> Any:
    """The reverse of `_split_lanes`."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, lane_axis + 1)
        return x.reshape(*x.shape[:lane_axis], -1, *x.shape[lane_axis + 2 :])

    return jax.tree.map(join, tree)
