"""Presets of lm2_jax.reproduce_babilong: models, settings, seeds and sizes of a study."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Changes = Mapping[str, Mapping[str, Any]]  # of a config, by section


@dataclasses.dataclass(frozen=True)
class Preset:
    """The size of a study.

    Attributes:
      config: name of the shipped config that every cell starts from.
      base: changes for every cell.
      models: changes by name; all have as many parameters as `lm2`, and rmt has as large a memory.
      settings: learning rates and training windows, of which every model's best is selected with the first seed. A
        model with a window of its own has the learning rates alone.
      seeds: of the comparison.
      longer: models that are also trained twice as long in their best setting, and with how many of the seeds.
      ablations: changes of lm2 by name, for the table of its parts; all have as many parameters as lm2.
      ablation_base: changes for those cells.
      ablation_seeds: of those cells.
      d_ff_multiple: divisor of the width of feed-forward layers where it compensates for a memory.
    """

    config: str
    base: Changes
    models: Mapping[str, Changes]
    settings: Mapping[str, Changes]
    seeds: tuple[int, ...]
    longer: Mapping[str, int]
    ablations: Mapping[str, Changes]
    ablation_base: Changes
    ablation_seeds: tuple[int, ...]
    d_ff_multiple: int = 1


def _stages(*stages: tuple[int, int, float | None, int | None]) -> list[dict[str, Any]]:
    names = ("segments", "segment_length", "advance_accuracy", "steps")
    return [dict(zip(names, stage, strict=True)) for stage in stages]


PRESETS = {
    "smoke": Preset(
        config="babilong_study",
        base={
            "model": {"d_model": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "d_ff": 24},
            "memory": {"num_slots": 4, "num_heads": 2},
            "data": {"segments_per_window": 2, "batch_size": 4},
            "optim": {"warmup_steps": 1},
            "train": {"steps": 3, "curriculum": []},
            "eval": {"lengths": [0, 2, 4], "questions": 4, "every_steps": 0},
        },
        models={
            "lm2": {},
            "rmt": {"memory": {"kind": "rmt"}},
            "none": {"memory": {"kind": "none"}},
        },
        settings={"as it is": {}},
        seeds=(0, 1),
        longer={"none": 1},
        ablations={"as it is": {}},
        ablation_base={},
        ablation_seeds=(0,),
    ),
    "cpu": Preset(
        config="babilong_study",
        base={},
        models={
            "lm2": {},
            "rmt": {"memory": {"kind": "rmt", "num_slots": 32}},
            "none": {"memory": {"kind": "none"}},
            "full attention": {  # one segment: the whole window, and the whole context when asked
                "memory": {"kind": "none"},
                "data": {"segment_length": 256, "segments_per_window": 1},
                "train": {"curriculum": _stages((1, 64, None, 1300), (1, 128, None, 900), (1, 256, None, None))},
                "eval": {"one_segment": True, "lengths": [0, 1, 2, 4, 8]},
            },
        },
        settings={
            "4 segments, 2e-3": {},
            "4 segments, 1e-3": {"optim": {"learning_rate": 1e-3}},
            "8 segments, 2e-3": {  # of half as many lanes: as many tokens
                "data": {"segments_per_window": 8, "batch_size": 16},
                "train": {
                    "curriculum": _stages(
                        (1, 128, None, 700), (4, 32, None, 600), (8, 32, None, 900), (8, 64, None, None)
                    )
                },
            },
            "up to 8 segments, 2e-3": {  # as many tokens in fewer steps
                "data": {"segments_per_window": 8},
                "train": {
                    "steps": 2150,
                    "curriculum": _stages(
                        (1, 64, None, 700),
                        (2, 32, None, 600),
                        (4, 32, None, 500),
                        (8, 32, None, 300),
                        (8, 64, None, None),
                    ),
                },
            },
            "no convolution, 2e-3": {"model": {"conv_width": 0}},
        },
        seeds=(0, 1, 2),
        longer={"lm2": 3, "rmt": 2, "none": 1, "full attention": 2},
        ablations={
            "as it is": {},
            "independent gates": {"memory": {"gates": "independent"}},
            "b_f 0": {"memory": {"forget_bias": 0.0}},
            "b_f 1": {"memory": {"forget_bias": 1.0}},
            "b_f 4": {"memory": {"forget_bias": 4.0}},
            "N 32, M 48": {"memory": {"num_slots": 32, "width": 48}},
            "N 24, M 64": {"memory": {"num_slots": 24, "width": 64}},
            "bank in the first block, N 48": {"memory": {"num_layers": 1, "num_slots": 48}},
            "banks in the first two blocks, N 24": {"memory": {"num_layers": 2, "num_slots": 24}},
            "no convolution": {"model": {"conv_width": 0}},
            "no curriculum": {"train": {"curriculum": []}},
            "windows of 3 segments": {
                "data": {"segments_per_window": 3},
                "train": {"curriculum": _stages((1, 72, 0.95, None), (3, 24, None, None))},
            },
        },
        ablation_base={  # the embedded default, asked at 16 times the trained length besides
            "model": {"num_layers": 3, "d_model": 96, "d_ff": 192, "conv_width": 4},
            "memory": {"num_slots": 16},
            "data": {
                "batch_size": 32,
                "segment_length": 24,
                "segments_per_window": 6,
                "stories": {"tasks": ["qa1"], "facts": [1, 10], "questions_between": [0, 1], "questions_after": [3, 4]},
            },
            "optim": {"kind": "adamw", "decay_fraction": 0.3},
            "train": {
                "steps": 900,
                "remat": "block",
                "unroll": 1,
                "curriculum": _stages((1, 72, 0.95, None), (3, 24, 0.95, 250), (6, 24, None, None)),
            },
            "eval": {"lengths": [6, 12, 24, 48, 96], "questions": 500, "every_steps": 0},
            "checkpoint": {"every_steps": 250},
        },
        ablation_seeds=(0, 1),
    ),
    "full": Preset(  # for a v5e:4x4; rmt's 64 memory tokens on either side make 2,048 positions
        config="lm2_1b7",
        base={
            "model": {"vocab_size": None},  # the tokenizer's
            "data": {
                "source": "stories",
                "path": None,
                "validation_path": None,
                "background": "{background}",
                "boundaries": "segment",
                "stories": {
                    "tasks": ["qa1", "qa2", "qa3", "qa4", "qa5"],
                    "facts": [2, 40],
                    "questions_between": [0, 8],
                    "questions_after": [3, 4],
                },
                "segment_length": 1920,
                "segments_per_window": 4,
                "batch_size": 16,
            },
            "tokenizer": {"kind": "llama3", "path": "{tokenizer}"},
            "optim": {"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 200, "decay_fraction": 0.2},
            "train": {
                "steps": 5000,
                "curriculum": _stages((1, 1920, None, 1500), (2, 1920, None, 1000), (4, 1920, None, None)),
            },
            "eval": {"every_steps": 500, "lengths": [0, 4, 8, 16, 32, 64], "questions": 100},
            "checkpoint": {"every_steps": 250, "keep": 1},
        },
        models={
            "lm2": {},
            "rmt": {"memory": {"kind": "rmt", "num_slots": 64, "width": None}},
            "none": {"memory": {"kind": "none"}},
            "full attention": {
                "memory": {"kind": "none"},
                "data": {"segment_length": 7680, "segments_per_window": 1},
                "train": {"curriculum": _stages((1, 1920, None, 1500), (1, 3840, None, 1000), (1, 7680, None, None))},
                "eval": {"one_segment": True, "lengths": [0, 1, 2, 4, 8, 16]},
            },
        },
        settings={
            "4 segments, 1e-4": {},
            "4 segments, 3e-5": {"optim": {"learning_rate": 3e-5}},
            "4 segments, 3e-4": {"optim": {"learning_rate": 3e-4}},
            "8 segments, 1e-4": {  # as many tokens in fewer steps, as in the next
                "data": {"segments_per_window": 8},
                "train": {
                    "steps": 3250,
                    "curriculum": _stages((1, 1920, None, 1500), (4, 1920, None, 500), (8, 1920, None, None)),
                },
            },
            "up to 8 segments, 1e-4": {
                "data": {"segments_per_window": 8},
                "train": {
                    "steps": 4375,
                    "curriculum": _stages(
                        (1, 1920, None, 1500), (2, 1920, None, 1000), (4, 1920, None, 1250), (8, 1920, None, None)
                    ),
                },
            },
        },
        seeds=(0, 1, 2),
        longer={},
        ablations={},
        ablation_base={},
        ablation_seeds=(),
        d_ff_multiple=128,
    ),
}
