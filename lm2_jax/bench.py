"""Measures training and decoding on the devices that are here, always as a ratio to something measured beside it.

    python -m lm2_jax.bench --config configs/babilong_tiny.yaml --output bench.json

Every table is one race: its programs are compiled, then run in turns, so that a busy machine slows all of them alike.
The tokens are random; the weights are fresh.
"""

from __future__ import annotations

from lm2_jax.common.command_line import before_imports, bench_arguments

if __name__ == "__main__":
    before_imports(bench_arguments)

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.config import Config, StageConfig, load_config, replace
from lm2_jax.decoding import sampling
from lm2_jax.model import build_model
from lm2_jax.model.sizes import memory_size, parameters, with_parameters
from lm2_jax.parallel.mesh import make_mesh, to_devices, use_mesh
from lm2_jax.segments import choose_schedule
from lm2_jax.tokenizer import with_vocabulary
from lm2_jax.training.state import StepConfig, create_state
from lm2_jax.training.step import make_train_step

_LEAST_SECONDS = 0.2  # a turn repeats its program for so long
_ROWS = 8  # decoded at once


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program that can be run again and again.

    Attributes:
      run: runs it so many times, and waits for the last.
      tokens: of one run.
      config: its model's.
    """

    run: Callable[[int], None]
    tokens: int
    config: Config


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Programs to be compared: each is made from a config when its turn to compile comes."""

    title: str
    make: Callable[[Config], Program]
    variants: Mapping[str, Config]  # the first is what the others are compared with


# --- What runs -----------------------------------------------------------------------------------------------------


def train_runner(config: Config) -> Program:
    """The train step that `train` runs, on the config's last stage."""
    run = build_model(config), make_mesh(config), StepConfig.of(config)
    B, stage = config.data.batch_size, config.stages[-1]
    batch = to_devices(run[1], B, random_batch(B, stage, config.model.vocab_size))
    with use_mesh(run[1]):
        state = create_state(*run)
        step = make_train_step(*run).lower(state, batch).compile()
    held = [state]  # the step donates it

    def run(times: int) -> None:
        for _ in range(times):
            held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)

    return Program(run, B * stage.segments * stage.segment_length, config)


def random_batch(B: int, stage: StageConfig, vocab_size: int) -> Batch:
    """A batch of random tokens, each lane one document that began earlier; a tenth of the targets are answers."""
    rng, shape = np.random.default_rng(0), (B, stage.segments, stage.segment_length)
    return Batch(
        tokens_BST=rng.integers(0, vocab_size, shape, dtype=np.int32),
        document_BST=np.ones(shape, np.int32),
        reset_BS=np.zeros(shape[:2], bool),
        targets_BST=rng.integers(0, vocab_size, shape, dtype=np.int32),
        answers_BST=rng.random(shape) < 0.1,
    )


def decode_runner(config: Config) -> Program:
    """A whole segment decoded token by token, its end (where memory is written) included."""
    model, T = build_model(config), config.stages[-1].segment_length
    params = jax.jit(model.init_params)(jax.random.key(config.train.seed))
    tokens_BQ, count_B = np.ones((_ROWS, 1), np.int32), np.ones(_ROWS, np.int32)
    held = [sampling.start(model, params, _ROWS, T)]

    def run(times: int) -> None:
        for _ in range(times * T):
            logits_BV, held[0] = sampling.advance(model, params, tokens_BQ, count_B, held[0])
        jax.block_until_ready(logits_BV)

    return Program(run, _ROWS * T, config)


# --- What is compared ----------------------------------------------------------------------------------------------


def comparisons(config: Config) -> Iterator[Comparison]:
    """All of a config, whose memory is lm2."""
    stage = config.stages[-1]
    S, T = stage.segments, stage.segment_length
    config = _windows(config, S, T)
    kinds = _kinds(config)
    yield Comparison("Training, by kind of memory (equal parameters, equal tokens)", train_runner, kinds)
    yield Comparison("Decoding a segment, by kind of memory", decode_runner, kinds)
    schedules = {name: replace(config, train={"schedule": name}) for name in ("segment", "layer")}
    yield Comparison("Training, by schedule", train_runner, schedules)
    lengths = (S, 2 * S, 4 * S)
    yield Comparison(
        "Training, by segments in a window", train_runner, {f"S {s}": _windows(config, s, T) for s in lengths}
    )
    slots = (config.memory.num_slots, 2 * config.memory.num_slots, 4 * config.memory.num_slots)
    by_slots = {f"N {n}": replace(config, memory={"num_slots": n}) for n in slots}
    yield Comparison("Training, by slots", train_runner, by_slots)
    yield Comparison("Decoding a segment, by slots", decode_runner, by_slots)
    # full attention over the whole window, beside segments that share it through memory
    contexts = {f"lm2, {s} x {T}": _windows(config, s, T) for s in lengths}
    contexts |= {f"none, 1 x {s * T}": _windows(kinds["none"], 1, s * T) for s in lengths}
    yield Comparison("Training, by context: segments with memory, and full attention", train_runner, contexts)
    yield Comparison("Decoding, by context: segments with memory, and full attention", decode_runner, contexts)


def _kinds(config: Config) -> dict[str, Config]:
    """The same model with another memory or none; rmt's tokens are as many as slots, at most a quarter of a segment."""
    count, tokens = parameters(config), min(config.memory.num_slots, config.stages[-1].segment_length // 4)
    others = {
        "none": replace(config, memory={"kind": "none"}),
        "rmt": replace(config, memory={"kind": "rmt", "num_slots": max(tokens, 1)}, train={"schedule": "auto"}),
    }
    others = {name: with_parameters(other, count) for name, other in others.items()}
    return {"none": others["none"], "lm2": config, "rmt": others["rmt"]}


def _windows(config: Config, segments: int, segment_length: int) -> Config:
    data = {"segments_per_window": segments, "segment_length": segment_length}
    return replace(config, data=data, train={"curriculum": ()})


# --- Measuring -----------------------------------------------------------------------------------------------------


def measure(race: Comparison, rounds: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of a run of every entrant (least, median, largest of `rounds` turns), and what follows from them."""
    runners, repeats = {}, {}
    for name, config in race.variants.items():
        log(f"compiling: {name}")
        runners[name] = race.make(config)
        runners[name].run(1)
        repeats[name] = max(1, round(_LEAST_SECONDS / max(_seconds(runners[name], 1), 1e-6)))
    turns: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        for name, runner in runners.items():
            turns[name].append(_seconds(runner, repeats[name]))
    per_token = {name: np.array(turns[name]) / runner.tokens for name, runner in runners.items()}
    first, rows = next(iter(per_token.values())), []
    for name, runner in runners.items():
        ratios = per_token[name] / first  # of the same round
        rows.append(
            {
                "name": name,
                "parameters": parameters(runner.config),
                "memory_size": memory_size(runner.config),
                "tokens": runner.tokens,
                "seconds": [min(turns[name]), statistics.median(turns[name]), max(turns[name])],
                "tokens_per_second": float(1 / np.median(per_token[name])),
                "time_per_token_ratio": float(np.median(ratios)),
                "ratio_range": [float(min(ratios)), float(max(ratios))],
            }
        )
    return rows


def _seconds(runner: Program, times: int) -> float:
    began = time.perf_counter()
    runner.run(times)
    return (time.perf_counter() - began) / times


def table_of(race: Comparison, rows: Sequence[Mapping[str, Any]]) -> Table:
    """For people: medians, and the time a token takes as a multiple of the first row's."""
    table = Table(title=race.title, title_justify="left")
    for header in ("", "parameters", "tokens", "ms", "tokens/s", "time a token", "range"):
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        low, high = row["ratio_range"]
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds'][1] * 1e3:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['time_per_token_ratio']:.2f}",
            f"{low:.2f} - {high:.2f}",
        )
    return table


# --- The command ---------------------------------------------------------------------------------------------------


def main() -> None:
    """The command."""
    arguments = bench_arguments()
    if arguments.rounds < 1:
        raise UserError(f"--rounds: found {arguments.rounds}; expected 1 or more")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise UserError(f"--output: found {arguments.output}; its directory does not exist")
    config = with_vocabulary(load_config(arguments.config, arguments.set))
    if config.memory.kind != "lm2":
        raise UserError(f"memory.kind: found {config.memory.kind}; bench compares a config of lm2 with none and rmt")
    wanted = [race for race in comparisons(config) if arguments.only.lower() in race.title.lower()]
    if not wanted:
        titles = "\n".join(f"  {race.title}" for race in comparisons(config))
        raise UserError(f"--only: found {arguments.only!r}, which is in no title; there are\n{titles}")
    console, device = Console(highlight=False, soft_wrap=True), jax.devices()[0].device_kind
    console.print(
        f"{jax.device_count()} {device} device(s); schedule auto is {choose_schedule(build_model(config), 'auto')}"
    )
    figures: dict[str, Any] = {
        "device": device,
        "devices": jax.device_count(),
        "rounds": arguments.rounds,
        "config": config.model_dump(mode="json"),
        "races": {},
    }
    with console.status("") as status:
        for race in wanted:
            rows = measure(race, arguments.rounds, lambda what, race=race: status.update(f"{race.title}: {what}"))
            figures["races"][race.title] = rows
            console.print(table_of(race, rows))
            if arguments.output is not None:  # after every race: an interrupted run keeps what it measured
                arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
