"""The cells of the study of docs/adopt.md: what a memory adds to a pretrained Llama.

A cell is trained in legs, each from the weights of the one before it, and is compared with others that read the same
tokens: `memory and LoRA` with `LoRA`, whose banks are there, too, but frozen at zero influence, so that both have the
same additions to the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lm2_jax.config import Config, load_config, replace

Part = Literal["facts", "books"]

_LORA = ("bank_blocks/*_lora_?", "blocks/*_lora_?")
_WINDOWLESS = {"window": None, "sinks": 0, "max_distance": None}
TRAINED: Mapping[str, tuple[str, ...]] = {
    "memory and LoRA": ("memory", *_LORA),
    "LoRA": _LORA,
    "memory": ("memory",),
    "memory and all weights from the first bank on": ("memory", "bank_blocks/*", "blocks/*", "final_norm/scale"),
}
CHAPTERS = r"\n(?=(?:CHAPTER|Chapter|ADVENTURE) [0-9IVXL]+)"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model of the study.

    Attributes:
      part: questions about facts, or the loss on books.
      trained: a name in TRAINED.
      seed: of data and initial weights.
      legs: the configs it is trained with in turn, but for run directories and initial weights.
    """

    part: Part
    trained: str
    seed: int
    legs: tuple[Config, ...]

    @property
    def name(self) -> str:
        """Stem of its files' names."""
        return f"{self.part}-{self.trained.replace(' ', '_')}-{self.seed}"


def cells(part: Part, start: Path, texts: list[str], questions: list[str], seeds: int) -> list[Cell]:
    """The cells of a part, in the order in which they are trained.

    Args:
      start: the pretrained model, a converted directory with its tokenizer.
      texts: books: to train on; facts: whose sentences stand among the facts.
      questions: bAbI files that are asked about, besides the generator's held-out stories.
    """
    base = replace(load_config("adopt_smollm2"), tokenizer={"path": str(start / "tokenizer.json")})
    legs = _books(base, texts) if part == "books" else _facts(base, texts, questions)
    names = ("memory and LoRA", "LoRA") if part == "books" else tuple(TRAINED)
    return [
        Cell(
            part,
            name,
            seed,
            tuple(replace(leg, optim={"train": TRAINED[name]}, train={"seed": seed}) for leg in legs),
        )
        for seed in range(seeds)
        for name in names
    ]


def _books(base: Config, texts: list[str]) -> list[Config]:
    """One leg on chapters of novels: windows of four segments of 256 tokens, attention over the last 256."""
    return [
        replace(
            base,
            data={"path": texts, "document_separator": CHAPTERS, "batch_size": 2},
            optim={"warmup_steps": 10, "decay_fraction": 0.4},
            train={"steps": 80, "log_every": 5},
            eval={"every_steps": 0},
            checkpoint={"every_steps": 20, "keep": 1},
        )
    ]


def _facts(base: Config, texts: list[str], questions: list[str]) -> list[Config]:
    """Three legs on question stories, the loss on the answers alone, and facts at some distance from the questions.

    First two short segments a window, each by itself, so that nearly every answer needs memory; then four; then longer
    ones among sentences of books, with attention over their edges.
    """
    common = replace(
        base,
        memory={"num_slots": 64, "write": "top_k", "forget_bias": 0.0},
        data={
            "source": "stories",
            "stories": {"facts": [2, 5], "questions_between": [0, 0], "questions_after": [3, 4], "gap": 14},
            "path": None,
            "document_separator": None,
            "segments_per_window": 4,
            "batch_size": 8,
        },
        optim={"learning_rate": 1e-3, "schedule": "constant", "lm_loss_weight": 0.0},
        eval={"every_steps": 0, "lengths": [4, 8, 16, 32, 64], "questions": 24, "path": questions or None},
        checkpoint={"every_steps": 20, "keep": 1},
    )
    two = replace(
        common,
        model=_WINDOWLESS,
        data={"segment_length": 32, "segments_per_window": 2},
        train={"steps": 160},
        eval={"lengths": [2], "questions": 8, "path": None},
    )
    short = {"segments": 2, "segment_length": 32, "advance_accuracy": 0.95, "steps": 250}
    four = replace(
        two,
        optim={"schedule": "linear"},
        data={"segments_per_window": 4},
        train={"steps": 500, "curriculum": [short, {"segments": 4, "segment_length": 32}]},
    )
    long = replace(
        common,
        model={"window": 64, "sinks": 4, "max_distance": 8191},
        data={"segment_length": 64, "batch_size": 4, "background": texts, "stories": {"facts": [2, 6], "gap": 64}},
        optim={"learning_rate": 5e-4, "schedule": "linear"},
        train={"steps": 120},
    )
    return [two, four, long]
