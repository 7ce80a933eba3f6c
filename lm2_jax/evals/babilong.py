"""BABILong (arXiv 2406.10149): questions about facts in long contexts, answered by generation, memory fresh for each.

The metric is the official one. Prompts stream through memory, so any length costs the state of one segment.
Axes: B samples at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lm2_jax.common.errors import UserError
from lm2_jax.common.progress import clock
from lm2_jax.config import BabilongConfig, BabilongTask, Config
from lm2_jax.data.babi.babilong import (
    BuiltSamples,
    Sample,
    babi_questions,
    find_samples,
    generated_questions,
    parse_length,
    read_samples,
)
from lm2_jax.data.babi.background import Books
from lm2_jax.data.paths import expand_paths
from lm2_jax.evals.babilong_prompts import TASKS, official_prompt
from lm2_jax.evals.generation import answer
from lm2_jax.evals.model import EvalModel
from lm2_jax.evals.results import ResultLog, finished_path
from lm2_jax.tokenizer import Tokenizer, encode_long, load_tokenizer
from lm2_jax.training.accuracy import wilson_interval

Result = dict[str, Any]

# --- The metric ----------------------------------------------------------------------------------------------------


def is_correct(output: str, target: str, question: str, labels: Collection[str]) -> bool:
    """The official metric: exactly one of the task's labels is named, and it is the target.

    The output counts up to its first full stop, "<context>" or "<example>", in lower case. Labels are looked for as
    substrings; those in the question do not count. A target with a comma and more than 3 characters is a list: all its
    parts must be named, and nothing else. (Since "none" holds "one", the target none of qa7 is never met; so it is in
    the official code.)
    """
    output, target, question = output.lower(), target.lower(), question.lower()
    for end in (".", "<context>", "<example>"):
        output = output.partition(end)[0]
    named = {label for label in map(str.lower, labels) if label in output and label not in question}
    is_list = "," in target and len(target) > 3
    wanted = target.split(",") if is_list else [target]
    return len(named) == len(wanted) and named.issuperset(wanted)


# --- Evaluation ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Cell:
    """The samples of a task at a length, and the names and sizes of the files that they come from."""

    task: BabilongTask
    length: str
    count: int
    open: Callable[[], Sequence[Sample]]
    source: str

    def key(self, index: int) -> tuple:
        """Of the record of a sample."""
        return self.task, self.length, self.source, index


_KEY = ("task", "length", "source", "index")


def evaluate(loaded: EvalModel, output: Path | None, log: Callable[[str], None]) -> Result:
    """Asks eval.babilong.samples questions of every task at every length, the shortest first.

    Answers are greedy, end at the first full stop (nothing after it counts) and at the end token. Finished samples are
    kept beside `output`, and are not asked again. `say` is told what is going on.

    Returns JSON: `cells` (task, length, asked, correct, accuracy, 95% Wilson interval, mean tokens of a prompt), and
    `mean_qa1_qa5` by length where all five were asked (the leaderboard's average).
    Raises UserError for samples that are missing, damaged or cannot be built, before anything is asked.
    """
    ask, tokenizer = loaded.config.eval.babilong, loaded.tokenizer
    cells = sorted(_cells(loaded), key=lambda cell: parse_length(cell.length))
    longest = cells[-1]  # whether the books have text enough, and the tokenizer all words, is known now
    encode_prompt(longest.open()[0], longest.task, ask, tokenizer)
    finished = ResultLog(finished_path(output), _identity(loaded), _KEY)
    left = {cell: [i for i in range(cell.count) if cell.key(i) not in finished] for cell in cells}
    progress = _Progress(log, loaded.config, left)
    shards = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    for cell, indices in left.items():
        samples = cell.open() if indices else ()
        size = min(loaded.config.data.batch_size, -(-cell.count // shards) * shards)
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            asked = [samples[index] for index in batch]
            prompts = [encode_prompt(sample, cell.task, ask, tokenizer) for sample in asked]
            answers = answer(loaded, prompts, size, ask.max_new_tokens, stops=["."])
            finished.add(
                {
                    **dict(zip(_KEY, cell.key(index), strict=True)),
                    "prompt_tokens": len(prompt),
                    "question": sample.question,
                    "target": sample.target,
                    "output": text,
                    "correct": is_correct(text, sample.target, sample.question, TASKS[cell.task].labels),
                }
                for index, sample, prompt, text in zip(batch, asked, prompts, answers, strict=True)
            )
            progress.advance(cell, len(batch), cell.count - len(indices) + start + len(batch))
    return {
        "task": "babilong",
        "checkpoint": loaded.checkpoint,
        "settings": ask.model_dump(mode="json"),
        "cells": (scores := [_score(cell, finished) for cell in cells]),
        "mean_qa1_qa5": _leaderboard(scores),
    }


def _cells(loaded: EvalModel) -> Iterator[_Cell]:
    config, seed = loaded.config, loaded.config.train.seed
    ask = config.eval.babilong
    if ask.path is not None:
        for task in ask.tasks:
            for length in ask.lengths:
                files = find_samples(ask.path, task, length)
                count = min(ask.samples, len(read_samples(files)))
                yield _Cell(task, length, count, functools.partial(read_samples, files), _describe(files))
        return
    counter = load_tokenizer(ask.counter) if ask.counter else loaded.tokenizer
    books = Books(ask.books) if ask.books else None
    for task in ask.tasks:
        if ask.babi is None:
            questions, files = generated_questions(task, config.data.stories, seed, ask.samples), []
        else:
            questions, files = babi_questions(ask.babi, task, seed)
        for length in ask.lengths:
            samples = BuiltSamples(
                questions, parse_length(length), counter, books, (seed, int(task[2:])), count=ask.samples
            )
            yield _Cell(task, length, len(samples), lambda samples=samples: samples, _describe(files))


def encode_prompt(sample: Sample, task: BabilongTask, ask: BabilongConfig, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a sample's prompt, int32 [n]."""
    text = official_prompt(sample, task) if ask.prompt == "official" else f"{sample.context} {sample.question}"
    ids = encode_long(tokenizer, text)
    if (unknown := getattr(tokenizer, "unk_id", None)) is not None and unknown in ids:
        raise UserError(
            "tokenizer.kind stories does not know every word of the prompts; it has those of qa1 to qa5 and of the "
            "built-in background: leave out eval.babilong.books and set eval.babilong.prompt=plain, or evaluate a "
            "model with another tokenizer"
        )
    return np.concatenate([np.array([id for id in (tokenizer.bos_id,) if id is not None], np.int32), ids])


def _identity(loaded: EvalModel) -> dict[str, Any]:
    """All that an answer depends on, but for what tells one record from another."""
    config, ask = loaded.config, loaded.config.eval.babilong
    return {
        "evaluation": "babilong",
        "parameters": loaded.fingerprint,
        "tokenizer": loaded.tokenizer.fingerprint(),
        "segment_length": config.trained_segment_length,
        "dtype": config.train.dtype,
        "seed": config.train.seed,
        "book_files": _describe(expand_paths(ask.books, "eval.babilong.books") if ask.books else ()),
        **ask.model_dump(mode="json", exclude={"tasks", "lengths", "samples"}),
    }


def _describe(files: Sequence[Path]) -> str:
    return ", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in files)


def _score(cell: _Cell, finished: ResultLog) -> Result:
    records = [finished[cell.key(index)] for index in range(cell.count)]
    correct = sum(record["correct"] for record in records)
    low, high = wilson_interval(correct, cell.count)
    return {
        "task": cell.task,
        "length": cell.length,
        "source": cell.source or "generator",
        "prompt_tokens": round(sum(record["prompt_tokens"] for record in records) / cell.count),
        "asked": cell.count,
        "correct": correct,
        "accuracy": correct / cell.count,
        "low": low,
        "high": high,
    }


def _leaderboard(cells: Sequence[Result]) -> dict[str, float]:
    """Mean accuracy over qa1 to qa5, for lengths at which all of them were asked."""
    five = ("qa1", "qa2", "qa3", "qa4", "qa5")
    at = {
        length: [c["accuracy"] for c in cells if c["length"] == length and c["task"] in five]
        for length in _lengths(cells)
    }
    return {length: sum(found) / 5 for length, found in at.items() if len(found) == 5}


class _Progress:
    """Says what was answered, and the time that is left if a call of the model goes on to cost what it did."""

    def __init__(self, log: Callable[[str], None], config: Config, left: Mapping[_Cell, Sequence[int]]) -> None:
        self._say, self._done, self._began = log, 0, time.monotonic()
        self._segment_length, self._new_tokens = config.trained_segment_length, config.eval.babilong.max_new_tokens
        self._all = sum(len(indices) * self._calls(cell) for cell, indices in left.items())

    def advance(self, cell: _Cell, count: int, answered: int) -> None:
        """After `count` more samples of a cell, of which so many are answered."""
        self._done += count * self._calls(cell)
        left = (time.monotonic() - self._began) / self._done * (self._all - self._done)
        self._say(f"{cell.task} {cell.length}: {answered}/{cell.count} answered, {clock(left)} left")

    def _calls(self, cell: _Cell) -> int:
        """One for a segment of the prompt and one for a new token."""
        return 1 + parse_length(cell.length) // self._segment_length + self._new_tokens


# --- What it looks like --------------------------------------------------------------------------------------------


def tables(result: Result) -> list[Table]:
    """Accuracy by task and length, with 95% intervals, for the terminal."""
    cells, lengths = result["cells"], _lengths(result["cells"])
    short_repr = Table(title=f"BABILong accuracy (prompt: {result['settings']['prompt']}), 95% interval in brackets")
    short_repr.add_column("task")
    for length in lengths:
        short_repr.add_column(length, justify="right")
    at = {(c["task"], c["length"]): f"{c['accuracy']:.0%} ({c['low']:.0%}-{c['high']:.0%})" for c in cells}
    for task in _tasks(cells):
        short_repr.add_row(task, *(at.get((task, length), "") for length in lengths))
    if means := result["mean_qa1_qa5"]:
        short_repr.add_section()
        short_repr.add_row("mean qa1-qa5", *(f"{means[length]:.1%}" if length in means else "" for length in lengths))
    return [short_repr]


def draw(result: Result, output: Path) -> list[Path]:
    """Two pictures beside `output`: the heat map of tasks and lengths, and accuracy against length."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells, tasks, lengths = result["cells"], _tasks(result["cells"]), _lengths(result["cells"])
    heat_map, curves = output.with_suffix(".heatmap.png"), output.with_suffix(".lengths.png")

    grid = [[math.nan] * len(lengths) for _ in tasks]
    for cell in cells:
        grid[tasks.index(cell["task"])][lengths.index(cell["length"])] = 100 * cell["accuracy"]
    figure, axis = plt.subplots(figsize=(2.4 + 0.75 * len(lengths), 1.6 + 0.42 * len(tasks)), layout="constrained")
    image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if not math.isnan(value):
                color = "black" if 15 < value < 85 else "white"
                axis.text(x, y, f"{value:.0f}", color=color, ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set(xlabel="length, tokens", title="BABILong accuracy, %")
    figure.colorbar(image, ax=axis)
    figure.savefig(heat_map, dpi=120)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for number, task in enumerate(tasks):
        own = [cell for cell in cells if cell["task"] == task]
        # a little apart, so that intervals can be told from each other
        x = [lengths.index(cell["length"]) + 0.3 * ((number + 0.5) / len(tasks) - 0.5) for cell in own]
        y = [100 * cell["accuracy"] for cell in own]
        spread = [[100 * (c["accuracy"] - c["low"]) for c in own], [100 * (c["high"] - c["accuracy"]) for c in own]]
        style = "o-" if number < 10 else "s--"
        axis.errorbar(x, y, yerr=spread, fmt=style, markersize=4, linewidth=1.2, elinewidth=0.7, capsize=2, label=task)
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set(xlabel="length, tokens", ylabel="accuracy, % (95% intervals)", ylim=(-2, 102), title="BABILong by length")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(curves, dpi=120)
    plt.close(figure)
    return [heat_map, curves]


def _tasks(cells: Sequence[Result]) -> list[str]:
    return sorted({cell["task"] for cell in cells}, key=lambda task: int(task[2:]))


def _lengths(cells: Sequence[Result]) -> list[str]:
    return sorted({cell["length"] for cell in cells}, key=parse_length)
