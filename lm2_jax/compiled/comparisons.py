"""Programs that `bench` compares: train and decode steps of configs that differ in one thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from lm2_jax.batch import Batch
from lm2_jax.config import Config, StageConfig, replace
from lm2_jax.decoding import placement, sampling
from lm2_jax.model import build_model
from lm2_jax.model.sizes import parameters, with_parameters
from lm2_jax.parallel.mesh import make_mesh, to_devices, use_mesh
from lm2_jax.training.state import StepConfig, create_state
from lm2_jax.training.step import make_train_step

_ROWS = 8  # batch of the decode step


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program that can be run again and again.

    Attributes:
      run: runs it a number of times and waits for the last.
      tokens: number of tokens in one run.
      config: config of its model.
    """

    run: Callable[[int], None]
    tokens: int
    config: Config


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Programs to compare; each is made from its config only when it is compiled.

    Attributes:
      variants: config by name; the others are compared with the first.
      makers: of variants that `make` does not make.
    """

    title: str
    make: Callable[[Config], Program]
    variants: Mapping[str, Config]
    makers: Mapping[str, Callable[[Config], Program]] = dataclasses.field(default_factory=dict)

    def program(self, name: str) -> Program:
        """The program of a variant."""
        return self.makers.get(name, self.make)(self.variants[name])


def train_program(config: Config) -> Program:
    """The train step of `train`, for the config's last stage."""
    model, mesh, step_config = build_model(config), make_mesh(config), StepConfig.of(config)
    B, stage = config.data.batch_size, config.stages[-1]
    batch = to_devices(mesh, B, random_batch(B, stage, config.model.vocab_size))
    with use_mesh(mesh):
        state = create_state(model, mesh, step_config)
        step = make_train_step(model, mesh, step_config).lower(state, batch).compile()
    held = [state]  # the step donates it

    def run(times: int) -> None:
        for _ in range(times):
            held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)

    return Program(run, B * stage.segments * stage.segment_length, config)


def random_batch(B: int, stage: StageConfig, vocab_size: int) -> Batch:
    """A batch of random tokens: each lane continues one document, and a tenth of the targets are answers."""
    rng, shape = np.random.default_rng(0), (B, stage.segments, stage.segment_length)
    return Batch(
        tokens_BST=rng.integers(0, vocab_size, shape, dtype=np.int32),
        document_BST=np.ones(shape, np.int32),
        reset_BS=np.zeros(shape[:2], bool),
        targets_BST=rng.integers(0, vocab_size, shape, dtype=np.int32),
        answers_BST=rng.random(shape) < 0.1,
    )


def decode_program(config: Config) -> Program:
    """The decode step, run for a whole segment including its end, where memory is written."""
    model, T = build_model(config), config.stages[-1].segment_length
    params = placement.prepare(model, jax.jit(model.init_params)(jax.random.key(config.train.seed)))
    tokens_BQ, count_B = np.ones((_ROWS, 1), np.int32), np.ones(_ROWS, np.int32)
    held = [sampling.start(model, params, _ROWS, T)]

    def run(times: int) -> None:
        for _ in range(times * T):
            logits_BV, held[0] = sampling.advance(model, params, tokens_BQ, count_B, held[0])
        jax.block_until_ready(logits_BV)

    return Program(run, _ROWS * T, config)


def comparisons(config: Config) -> Iterator[Comparison]:
    """All comparisons for a config with memory kind lm2."""
    stage = config.stages[-1]
    S, T = stage.segments, stage.segment_length
    config = _windows(config, S, T)
    kinds = _kinds(config)
    yield Comparison("Training, by kind of memory (equal parameters, equal tokens)", train_program, kinds)
    yield Comparison("Decoding a segment, by kind of memory", decode_program, kinds)
    schedules = {name: replace(config, train={"schedule": name}) for name in ("segment", "layer")}
    yield Comparison("Training, by schedule", train_program, schedules)
    lengths = (S, 2 * S, 4 * S)
    yield Comparison(
        "Training, by segments in a window", train_program, {f"S {s}": _windows(config, s, T) for s in lengths}
    )
    slots = (config.memory.num_slots, 2 * config.memory.num_slots, 4 * config.memory.num_slots)
    by_slots = {f"N {n}": replace(config, memory={"num_slots": n}) for n in slots}
    yield Comparison("Training, by slots", train_program, by_slots)
    yield Comparison("Decoding a segment, by slots", decode_program, by_slots)
    # segments connected by memory, against full attention over the whole window
    contexts = {f"lm2, {s} x {T}": _windows(config, s, T) for s in lengths}
    contexts |= {f"none, 1 x {s * T}": _windows(kinds["none"], 1, s * T) for s in lengths}
    yield Comparison("Training, by context: segments with memory, and full attention", train_program, contexts)
    yield Comparison("Decoding, by context: segments with memory, and full attention", decode_program, contexts)


def _kinds(config: Config) -> dict[str, Config]:
    """The config with each memory kind, at equal parameters; rmt has a memory token a slot, up to a quarter segment."""
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
