"""The training loop: from a config to a trained model in its run directory."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from lm2_jax.checkpoint.manager import Checkpoints
from lm2_jax.common.records import drop_records_after, read_records
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import Config
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.loading import load_memory, load_weights
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.sizes import count_parameters, model_flops
from lm2_jax.parallel.mesh import make_mesh, own_lanes, to_devices, use_mesh
from lm2_jax.parallel.processes import is_alone, is_first, stop_signals
from lm2_jax.tokenizer import check_vocabulary, load_tokenizer
from lm2_jax.training.accuracy import accuracy_by_length
from lm2_jax.training.curriculum import Curriculum, Progress
from lm2_jax.training.metrics_log import MetricsLog
from lm2_jax.training.profile import traced
from lm2_jax.training.reporting import Reporter, SilentReporter
from lm2_jax.training.run_dir import check_data, claim, open_run_dir, origin_of_run, time_so_far, write_summary
from lm2_jax.training.state import StepConfig, TrainState, create_state, shardings_of
from lm2_jax.training.step import make_fresh_memory, make_train_step
from lm2_jax.training.timing import StepTimer
from lm2_jax.training.validation import validate


def train(config: Config) -> dict[str, Any]:
    """Runs a config from the newest checkpoint of its run directory, or from the start, to its end.

    Returns what it writes to summary.json; with several processes only the first does, and the others return nothing.
    Raises UserError for what the user can mend, TrainingFailed where the run cannot continue.
    """
    # --- What to run: tokenizer, data, run directory -----------------------------------------------------------------
    origin = origin_of_run(config)
    tokenizer = None if config.data.source == "bin" else load_tokenizer(config.tokenizer, origin)
    if tokenizer is not None:
        config = check_vocabulary(config, tokenizer)
    mesh, B = make_mesh(config), config.data.batch_size
    pipeline = Pipeline(config, tokenizer, None if is_alone() else own_lanes(mesh, B))
    run_dir = open_run_dir(config, origin)

    with use_mesh(mesh), claim(run_dir), contextlib.ExitStack() as cleanup:
        # --- Model and state: resumed, or made where it will live ----------------------------------------------------
        model, settings = build_model(config), StepConfig.of(config)
        checkpoints = cleanup.enter_context(contextlib.closing(Checkpoints(run_dir, config.checkpoint)))
        state, progress, beginning = initial_state(config, model, mesh, checkpoints)
        progress = check_data(progress, pipeline, run_dir)
        reporter = cleanup.enter_context(_open_reporter(config, run_dir, progress.step))
        parameters = count_parameters(state.all_params)
        reporter.log(f"{config.memory.kind}: {_describe_sizes(state)}, {_describe(mesh)}, run directory {run_dir}")
        reporter.log(beginning)

        # --- The loop ------------------------------------------------------------------------------------------------
        curriculum = cleanup.enter_context(contextlib.closing(Curriculum(config, pipeline)))
        timer = StepTimer(*time_so_far(run_dir), _flops_per_token(state), mesh)
        train_step = timer.timed(make_train_step(model, mesh, settings))
        train_step = cleanup.enter_context(traced(train_step, config, run_dir, progress.step, timer, reporter.log))
        log = MetricsLog(reporter, timer, config)
        stopping = False
        with stop_signals() as stop_requested:
            while progress.step < config.train.steps and not stopping:
                stage, windows = curriculum.windows(progress)
                batch = to_devices(mesh, B, timer.next_of(windows))
                state, metrics = train_step(state, batch)
                progress = progress.after_step(windows.get_state())
                log.add(metrics, progress, stage)

                last = progress.step == config.train.steps
                logging = _due(progress.step, config.train.log_every)
                validating = last or _due(progress.step, config.eval.every_steps)
                saving = last or _due(progress.step, config.checkpoint.every_steps)
                if validating:
                    with log.pause():
                        log.amend(validate(config, model, pipeline, mesh, state.all_params, stage))
                if logging or validating or saving:
                    progress = log.flush(progress)
                if curriculum.stage_is_over(progress, logging):
                    progress = curriculum.advance(log.flush(progress))
                elif logging:
                    progress = progress.without_answers()
                if saving:
                    with timer.pause():
                        checkpoints.save(state, dataclasses.asdict(progress), config)
                stopping = stop_requested(progress.step)

        if stopping:
            checkpoints.save(state, dataclasses.asdict(log.flush(progress)), config)
        checkpoints.wait()
        if stopping:
            reporter.log(f"stopped after step {progress.step}; the same command resumes there")
            raise KeyboardInterrupt

        # --- The end: accuracy by length, summary, pictures ----------------------------------------------------------
        run = config, model, pipeline, mesh, state.all_params
        table = accuracy_by_length(*run, reporter.log) if config.data.source == "stories" else []
        return _finish(run_dir, progress, parameters, table, reporter) if is_first() else {}


def initial_state(
    config: Config, model: Decoder, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, Progress, str]:
    """State and progress to start from, and where they come from in words: a checkpoint, train.init_from or nowhere."""
    settings = StepConfig.of(config)
    state, shardings = create_state(model, mesh, settings), shardings_of(model, mesh, settings)
    restored = checkpoints.restore_latest(state, shardings)
    if restored is not None:
        return restored[0], Progress(**restored[1]), f"resuming after step {restored[1]['step']}"
    path = config.train.init_from
    if path is None:
        return state, Progress(), "starting from new weights"
    params, memory = load_weights(path, model, state.all_params), load_memory(path)
    state = state.with_params(params)
    if memory is not None and memory.shape == state.memory.shape:  # official: continues with the memory of the file
        memory = jax.device_put(memory, shardings.memory)
    else:
        memory = make_fresh_memory(model, mesh, settings)(state.all_params)
    return state.replace(memory=memory), Progress(), f"starting from the weights of {path}"


def _open_reporter(config: Config, run_dir: AnyPath, first_step: int) -> Reporter | SilentReporter:
    """The first process reports, from `first_step` on; what an interrupted run recorded after it is dropped."""
    if not is_first():
        return SilentReporter()
    drop_records_after(run_dir / "metrics.jsonl", first_step)
    return Reporter(config, run_dir, first_step)


def _finish(
    run_dir: AnyPath, progress: Progress, parameters: int, table: list[Any], reporter: Reporter
) -> dict[str, Any]:
    records = read_records(run_dir / "metrics.jsonl")
    summary = {
        "step": progress.step,
        "tokens": progress.tokens,
        "parameters": parameters,
        "loss": records[-1]["loss"],
        "validation_loss": records[-1].get("validation_loss"),
        "accuracy_by_length": table,
    }
    written = write_summary(run_dir, summary, records)
    reporter.log(f"written: {' and '.join(map(str, written))}")
    return summary


def _due(step: int, every: int) -> bool:
    """True every so many steps; 0: never."""
    return bool(every) and step % every == 0


def _flops_per_token(state: TrainState) -> float:
    return model_flops(count_parameters(state.all_params), 1, frozen=count_parameters(state.frozen))


def _describe_sizes(state: TrainState) -> str:
    sizes = f"{count_parameters(state.all_params):,} parameters"
    return f"{sizes}, {count_parameters(state.params):,} of them trained" if state.frozen else sizes


def _describe(mesh: Mesh) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{mesh.devices.size} {mesh.devices.flat[0].device_kind} device(s) ({axes})"
