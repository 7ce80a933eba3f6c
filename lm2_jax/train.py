"""Trains a model: `python -m lm2_jax.train --config configs/babilong_tiny.yaml --set train.steps=100`.

A run directory (train.run_dir) that holds a checkpoint is resumed, and goes on to the bit as if it had never stopped.
"""

from __future__ import annotations

from lm2_jax.common.command_line import before_imports, train_arguments

if __name__ == "__main__":
    before_imports(train_arguments)

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.files import lock_directory, write_atomically
from lm2_jax.compiled.explain import explain_sharding
from lm2_jax.config import Config, StageConfig, dump_config, load_config
from lm2_jax.convert.engine import by_path
from lm2_jax.data.lanes import make_iterator
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.loading import load, load_memory
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import make_mesh, own_lanes, to_devices, use_mesh
from lm2_jax.parallel.processes import is_alone, is_first, joined, stop_signals
from lm2_jax.plots.runs import Run, plot_runs
from lm2_jax.tokenizer import check_vocabulary, load_tokenizer, with_vocabulary
from lm2_jax.training.accuracy import Accuracy, accuracy_by_length
from lm2_jax.training.checkpoint import Checkpoints, Progress
from lm2_jax.training.health import Health
from lm2_jax.training.loss import zero_sums
from lm2_jax.training.optim import make_optimizer
from lm2_jax.training.reporting import (
    Record,
    Reporter,
    SilentReporter,
    accuracy_table,
    drop_records_after,
    read_records,
)
from lm2_jax.training.run_dir import read_run_config
from lm2_jax.training.state import TrainState, create_state
from lm2_jax.training.step import make_eval_step, make_fresh_memory, make_train_step
from lm2_jax.training.verify import verify

# Keys that may differ between a run directory and the command that resumes it: none of them changes what is learnt,
# but for train.steps, which moves the learning rate's decay.
_MAY_CHANGE = ("train.run_dir", "train.steps", "train.max_skipped_steps", "data.prefetch", "checkpoint", "eval", "mesh")


def main() -> None:
    """The command."""
    arguments = train_arguments()
    if arguments.verify is not None:
        verify(arguments.verify)
        return
    config = load_config(arguments.config, arguments.set)
    if arguments.explain_sharding:
        print(explain_sharding(with_vocabulary(config), jax.devices()))
        return
    with joined() if arguments.distributed else contextlib.nullcontext():
        train(config)


def train(config: Config) -> dict[str, Any]:
    """Runs a config from the newest checkpoint of its run directory, or from the start, to its end.

    Returns what it writes to summary.json; of several processes only the first does, the others return nothing.
    Raises UserError for what the user can mend, TrainingFailed where the run cannot go on.
    """
    # --- What to run: tokenizer, data, run directory -----------------------------------------------------------------
    tokenizer = None if config.data.source == "bin" else load_tokenizer(config.tokenizer)
    if tokenizer is not None:
        config = check_vocabulary(config, tokenizer)
    mesh = make_mesh(config)
    own = own_lanes(mesh, config.data.batch_size)
    pipeline = Pipeline(config, tokenizer, None if is_alone() else own)
    run_dir = _open_run_dir(config)

    with use_mesh(mesh), contextlib.ExitStack() as cleanup:
        if is_first():
            taken = f"{run_dir}: another process trains in it; wait, or give another train.run_dir"
            cleanup.enter_context(lock_directory(run_dir, taken))

        # --- Model and state, made where they will live --------------------------------------------------------------
        model, optimizer = build_model(config), make_optimizer(config.optim)
        state, shardings = create_state(model, optimizer, mesh, config.data.batch_size, config.train.seed)
        train_step = make_train_step(model, optimizer, mesh, shardings)
        validate = _Validation(config, pipeline, model, mesh, shardings)

        # --- Resume --------------------------------------------------------------------------------------------------
        checkpoints = Checkpoints(run_dir, config.checkpoint)
        cleanup.callback(checkpoints.close)
        restored = checkpoints.restore_latest(state, shardings)
        progress: Progress = {"step": 0, "stage": 0, "stage_start": 0, "tokens": 0, "correct": 0, "answers": 0}
        if restored is not None:
            state, progress = restored
            _check_data(progress, pipeline, run_dir)
        elif config.train.init_from:
            state = start_from(config.train.init_from, model, state, shardings)
        progress["data_fingerprint"] = pipeline.fingerprint()
        first_step = progress["step"]
        if is_first():
            drop_records_after(run_dir / "metrics.jsonl", first_step)

        # --- The loop ------------------------------------------------------------------------------------------------
        reporter = Reporter(run_dir, first_step, config.train.steps) if is_first() else SilentReporter()
        cleanup.enter_context(reporter)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        reporter.log(f"{config.memory.kind}: {parameters:,} parameters, {_describe(mesh)}, run directory {run_dir}")
        if restored is not None:
            reporter.log(f"resuming after step {first_step}")
        elif config.train.init_from:
            reporter.log(f"starting from the weights of {config.train.init_from}")
        log = _Log(reporter, progress, config.train.max_skipped_steps)
        stages, windows = config.stages, None
        stopped = False

        with stop_signals() as asked_to_stop:
            while progress["step"] < config.train.steps and not stopped:
                if windows is None:  # a new stage, or a resumed one
                    stage = stages[progress["stage"]]
                    windows = make_iterator(pipeline.training(stage), config.data.prefetch)
                    cleanup.callback(windows.close)  # its thread would outlive an error
                    if "data" in progress:
                        windows.set_state(progress["data"])
                batch = to_devices(mesh, config.data.batch_size, next(windows))
                state, metrics = train_step(state, batch)
                progress["step"] += 1
                progress["data"] = windows.get_state()
                log.add(metrics, stage)

                step = progress["step"]
                done = step == config.train.steps
                at_validation = config.eval.every_steps and step % config.eval.every_steps == 0
                at_checkpoint = step % config.checkpoint.every_steps == 0
                at_log = step % config.train.log_every == 0
                if at_validation or done:
                    log.extend(validate(state, stage))
                if at_log or at_validation or at_checkpoint or done:
                    log.flush(f"stage {progress['stage'] + 1}/{len(stages)}" if len(stages) > 1 else "")
                stage_is_over = progress["stage"] + 1 < len(stages) and _stage_is_over(stage, progress, at_log)
                if stage_is_over:
                    log.flush(f"stage {progress['stage'] + 1}/{len(stages)}")  # its answers do not count for the next
                    progress |= {"stage": progress["stage"] + 1, "stage_start": step}
                    windows.close()
                    windows = None
                if at_log or stage_is_over:
                    progress |= {"correct": 0, "answers": 0}
                if at_checkpoint or done:
                    checkpoints.save(state, progress, config)
                stopped = asked_to_stop(step)

        if stopped:
            log.flush("")
            checkpoints.save(state, progress, config)
            checkpoints.wait()
            reporter.log(f"stopped after step {progress['step']}; the same command goes on from there")
            raise KeyboardInterrupt
        checkpoints.wait()

        # --- The end: accuracy by length, pictures, summary ----------------------------------------------------------
        table: list[Accuracy] = []
        if config.data.source == "stories":
            table = accuracy_by_length(config, model, pipeline, mesh, state, shardings, reporter.log)
            reporter.log(accuracy_table(table, stages[-1].segments))
        if not is_first():
            return {}
        records = read_records(run_dir / "metrics.jsonl")
        summary = {
            "step": progress["step"],
            "tokens": progress["tokens"],
            "parameters": parameters,
            "loss": records[-1]["loss"],
            "validation_loss": records[-1].get("validation_loss"),
            "accuracy_by_length": table,
        }
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        written = [run_dir / "summary.json", run_dir / "training.png"]
        try:
            plot_runs(written[-1], [Run(run_dir.name, records, table)], ("loss", "answers", "length"))
        except UserError:  # no loss was finite
            written.pop()
        reporter.log(f"written: {' and '.join(map(str, written))}")
    return summary


def start_from(path: str, model: Decoder, state: TrainState, shardings: TrainState) -> TrainState:
    """The fresh state with the weights of another run or of a converted directory.

    Raises UserError if they are not the weights of this model.
    """
    other, params = load(path)
    mine, theirs = ({name: leaf.shape for name, leaf in by_path(tree).items()} for tree in (state.params, params))
    problems = [
        f"  {name}: {theirs.get(name, 'nothing')} there, {mine.get(name, 'nothing')} in this model"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    problems += [
        f"  {key}: {old!r} there, {new!r} here"
        for key, old, new in _differences(_beyond_shapes(other.config), _beyond_shapes(model.config))
    ]
    if problems:
        raise UserError(f"train.init_from: {path} holds another model:\n" + "\n".join(problems))
    params, memory = jax.device_put(params, shardings.params), load_memory(path)
    if memory is not None and memory.shape == state.memory.shape:  # official: goes on from the memory it was saved with
        return state.replace(params=params, memory=jax.device_put(memory, shardings.memory))
    return state.replace(params=params, memory=make_fresh_memory(model, shardings)(params))


def _beyond_shapes(config: Config) -> dict[str, Any]:
    """What weights mean besides their shapes. How many slots a bank has is free."""
    model = config.model.model_copy(update={"head_dim": config.model.attention_head_dim})
    return {
        "model": model.model_dump(exclude={"embedding_std"}),
        "memory": config.memory.model_dump(include={"kind", "num_heads", "gates"})
        if config.spec.num_memory_layers
        else None,
    }


class _Log:
    """Metrics that are still on the devices, until `flush` fetches and writes them."""

    def __init__(self, reporter: Reporter | SilentReporter, progress: Progress, max_skipped: int) -> None:
        self._reporter, self._progress, self._max_skipped = reporter, progress, max_skipped
        self._pending: list[tuple[Record, dict[str, jax.Array]]] = []
        self._since = time.monotonic()
        self._health = Health()

    def add(self, metrics: dict[str, jax.Array], stage: StageConfig) -> None:
        """The metrics of the step that was just started."""
        place = {"segments": stage.segments, "segment_length": stage.segment_length, "stage": self._progress["stage"]}
        record = {"step": self._progress["step"], **place, "epoch": self._progress["data"]["epoch"]}
        self._pending.append((record, metrics))

    def extend(self, more: Record) -> None:
        """Adds keys to the newest step's record."""
        self._pending[-1][0].update(more)

    def flush(self, stage: str) -> None:
        """Waits for the steps, counts their tokens and answers, writes their records and shows the last.

        Raises TrainingFailed if too many steps in a row were not finite.
        """
        if not self._pending:
            return
        records = []
        fetched = jax.device_get([metrics for _, metrics in self._pending])
        now = time.monotonic()
        tokens = sum(int(metrics["tokens_in_step"]) for metrics in fetched)
        for (place, _), metrics in zip(self._pending, fetched, strict=True):
            metrics = {name: value.item() for name, value in metrics.items()}
            tokens_here, answers, correct = (metrics.pop(f"{n}_in_step") for n in ("tokens", "answers", "correct"))
            self._progress["tokens"] += tokens_here
            self._progress["answers"] += answers
            self._progress["correct"] += correct
            record = {"step": place["step"], "tokens": self._progress["tokens"], **metrics, **place}
            record["accuracy"] = correct / answers if answers else None
            record["tokens_per_second"] = tokens / max(now - self._since, 1e-9)
            record["time"] = time.time()
            records.append(record)
        self._pending, self._since = [], now
        self._reporter.record(records)
        for record in records:
            for warning in self._health.look(record):
                self._reporter.log(f"warning: {warning}")
        self._reporter.show(records[-1], stage)
        if self._max_skipped and records[-1]["skipped_in_a_row"] >= self._max_skipped:
            raise TrainingFailed(
                f"{records[-1]['skipped_in_a_row']} steps in a row up to step {records[-1]['step']} had a loss or "
                "gradient that was not finite (limit: train.max_skipped_steps); start another run with a lower "
                "optim.learning_rate or longer optim.warmup_steps"
            )


class _Validation:
    """Loss on held-out documents, in a memory of its own: training's is never touched."""

    def __init__(
        self, config: Config, pipeline: Pipeline, model: Decoder, mesh: jax.sharding.Mesh, shardings: TrainState
    ) -> None:
        self._config, self._pipeline, self._mesh = config, pipeline, mesh
        self._eval_step = make_eval_step(model, mesh, shardings)
        self._fresh = make_fresh_memory(model, shardings)

    def __call__(self, state: TrainState, stage: StageConfig) -> Record:
        """Mean negative log-likelihood (nats a token), and the share of right answers where there are any."""
        lanes = self._pipeline.validation(stage)
        if lanes is None:
            return {}
        sums, memory, windows = zero_sums(), self._fresh(state.params), iter(lanes)
        for _ in range(self._config.eval.windows):
            batch = to_devices(self._mesh, self._config.data.batch_size, next(windows))
            here, memory = self._eval_step(state.params, memory, batch)
            sums = jax.tree.map(lambda a, b: a + b, sums, here)
        record = {"validation_loss": float(sums.nll) / max(int(sums.tokens), 1)}
        if int(sums.answers):
            record["validation_accuracy"] = int(sums.correct) / int(sums.answers)
        return record


def _stage_is_over(stage: StageConfig, progress: Progress, at_log: bool) -> bool:
    """After its steps; or, looked at every train.log_every steps, once its share of right answers is reached."""
    steps_over = stage.steps is not None and progress["step"] - progress["stage_start"] >= stage.steps
    learnt = (
        at_log
        and stage.advance_accuracy is not None
        and progress["answers"] > 0
        and progress["correct"] / progress["answers"] >= stage.advance_accuracy
    )
    return steps_over or learnt


def _open_run_dir(config: Config) -> Path:
    """Makes the run directory and its config.yaml. Raises UserError if it belongs to a run of another config."""
    run_dir = Path(config.train.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.run_dir: {run_dir} cannot be made ({error.strerror})") from None
    before = read_run_config(run_dir)
    if before is not None:
        differences = [
            f"  {key}: {old!r} in the run directory, {new!r} now"
            for key, old, new in _differences(before.model_dump(), config.model_dump())
            if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in _MAY_CHANGE)
        ]
        if differences:
            raise UserError(
                f"{run_dir} holds a run of another config; give this one another train.run_dir, or undo:\n"
                + "\n".join(differences)
                + f"\nWhat may change between runs: {', '.join(_MAY_CHANGE)}"
            )
    try:
        if is_first():
            write_atomically(run_dir / "config.yaml", dump_config(config))
    except OSError as error:
        raise UserError(f"train.run_dir: {run_dir} cannot be written to ({error.strerror})") from None
    return run_dir


def _check_data(progress: Progress, pipeline: Pipeline, run_dir: Path) -> None:
    """Raises UserError if the files or the tokenizer are not those that the checkpoint's place in the data is about."""
    if progress["data_fingerprint"] != pipeline.fingerprint():
        raise UserError(
            f"{run_dir}: the tokenizer or the files in data.path, data.validation_path or data.background have changed "
            "since its checkpoint; bring them back, or start another train.run_dir"
        )


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before:
            yield from _differences(before[name], now[name], f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now


def _describe(mesh: jax.sharding.Mesh) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{mesh.devices.size} {mesh.devices.flat[0].device_kind} device(s) ({axes})"


if __name__ == "__main__":
    run_command(main, interrupted="interrupted; the same command goes on")
