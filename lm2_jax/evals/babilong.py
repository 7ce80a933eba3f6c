"""BABILong (arXiv 2406.10149): questions about facts in long contexts, answered by generation, memory fresh for each.

The metric is the official one. Prompts stream through memory, so any length needs the state of one segment only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import content_digest, expand_paths
from lm2_jax.common.progress import Progress
from lm2_jax.common.statistics import wilson_interval
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import BabilongConfig, BabilongTask
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
from lm2_jax.evals import plots
from lm2_jax.evals.babilong_prompts import TASKS, official_prompt
from lm2_jax.evals.generation import generate_until
from lm2_jax.evals.model import EvalModel
from lm2_jax.evals.results import ResultLog, finished_path
from lm2_jax.evals.retrieval import check_retrieval, find_sentences
from lm2_jax.tokenizer import Tokenizer, load_tokenizer, prompt_ids

Result = dict[str, Any]

# --- The metric ----------------------------------------------------------------------------------------------------


def is_correct(output: str, target: str, question: str, labels: Collection[str]) -> bool:
    """The official metric: exactly one of the task's labels is named, and it is the target.

    Only the output before its first full stop, "<context>" or "<example>" counts; case does not matter. Labels are
    searched for as substrings; those in the question are ignored. A target with a comma and more than 3 characters is a
    list: all its items must be named, and nothing else. (Since "none" contains "one", the target "none" of qa7 is never
    met, as in the official code.)
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
        """Key of a sample's record."""
        return self.task, self.length, self.source, index


_KEY = ("task", "length", "source", "index")


def evaluate(loaded: EvalModel, output: AnyPath | None, log: Callable[[str], None]) -> Result:
    """Asks eval.babilong.samples questions of every task at every length, the shortest first.

    Answers are greedy, and end at the end token or the first full stop (nothing after it counts). Finished samples are
    kept beside `output`, and are not asked again. `log` receives progress lines.

    Returns JSON: `cells` (task, length, asked, correct, accuracy, 95% Wilson interval, mean tokens of a prompt), and
    `mean_qa1_qa5` by length where all five were asked (the leaderboard's average).
    Raises UserError for samples that are missing, damaged or cannot be built, before any question is asked.
    """
    settings = loaded.config.eval.babilong
    if settings.retrieval:
        check_retrieval()
    cells = sorted(_cells(loaded), key=lambda cell: parse_length(cell.length))
    longest = cells[-1]  # shows now whether the books have enough text, and the tokenizer all words
    encode_prompt(longest.open()[0], longest.task, settings, loaded.tokenizer)
    results = ResultLog(finished_path(output), _identity(loaded), _KEY)
    _ask_questions(loaded, cells, results, log)
    return {
        "task": "babilong",
        "checkpoint": loaded.checkpoint,
        "settings": settings.model_dump(mode="json"),
        "cells": (scores := [_summarise(cell, results) for cell in cells]),
        "mean_qa1_qa5": _leaderboard(scores),
    }


def _ask_questions(loaded: EvalModel, cells: Sequence[_Cell], results: ResultLog, log: Callable[[str], None]) -> None:
    """Adds to `results` the records of all samples that it lacks."""
    config, settings = loaded.config, loaded.config.eval.babilong
    left = {cell: [i for i in range(cell.count) if cell.key(i) not in results] for cell in cells}

    def cost(cell: _Cell) -> int:
        """Calls of the model for a sample: one for a segment of the prompt and one for a new token."""
        return 1 + parse_length(cell.length) // config.trained_segment_length + settings.max_new_tokens

    progress, done = Progress(log, sum(len(indices) * cost(cell) for cell, indices in left.items())), 0
    shards = loaded.mesh.shape["data"] * loaded.mesh.shape["fsdp"]
    for cell, indices in left.items():
        samples = cell.open() if indices else ()
        size = min(config.data.batch_size, -(-cell.count // shards) * shards)
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            asked = [samples[index] for index in batch]
            prompts = [encode_prompt(sample, cell.task, settings, loaded.tokenizer) for sample in asked]
            answers = generate_until(loaded, prompts, size, settings.max_new_tokens, stops=["."])
            results.add(
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
            done += len(batch) * cost(cell)
            answered = cell.count - len(indices) + start + len(batch)
            progress.report(done, f"{cell.task} {cell.length}: {answered}/{cell.count} answered")


def _cells(loaded: EvalModel) -> Iterator[_Cell]:
    config, seed = loaded.config, loaded.config.train.seed
    settings = config.eval.babilong
    if settings.path is not None:
        for task in settings.tasks:
            for length in settings.lengths:
                files = find_samples(settings.path, task, length)
                count = min(settings.samples, len(read_samples(files)))
                yield _Cell(task, length, count, functools.partial(read_samples, files), _describe(files))
        return
    counter = load_tokenizer(settings.counter) if settings.counter else loaded.tokenizer
    books = Books(settings.books) if settings.books else None
    for task in settings.tasks:
        if settings.babi is None:
            questions, files = generated_questions(task, config.data.stories, seed, settings.samples), []
        else:
            questions, files = babi_questions(settings.babi, task, seed)
        for length in settings.lengths:
            samples = BuiltSamples(
                questions, parse_length(length), counter, books, (seed, int(task[2:])), count=settings.samples
            )
            yield _Cell(task, length, len(samples), lambda samples=samples: samples, _describe(files))


def encode_prompt(sample: Sample, task: BabilongTask, settings: BabilongConfig, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of a sample's prompt, int32 [n]. Raises UserError if the tokenizer lacks words of it."""
    if settings.retrieval:
        context = find_sentences(sample.context, sample.question, settings.retrieved)
        sample = dataclasses.replace(sample, context=context)
    text = official_prompt(sample, task) if settings.prompt == "official" else f"{sample.context} {sample.question}"
    ids = prompt_ids(tokenizer, text)
    if (unknown := getattr(tokenizer, "unk_id", None)) is not None and unknown in ids:
        raise UserError(
            "tokenizer.kind stories does not know every word of the prompts; it knows those of qa1 to qa5 and of the "
            "built-in background: leave out eval.babilong.books and set eval.babilong.prompt=plain, or evaluate a "
            "model with another tokenizer"
        )
    return ids


def _identity(loaded: EvalModel) -> dict[str, Any]:
    """Everything that an answer depends on, besides the entries of a record's key."""
    config, settings = loaded.config, loaded.config.eval.babilong
    books = expand_paths(settings.books, "eval.babilong.books") if settings.books else ()
    unused = set() if settings.retrieval else {"retrieval", "retrieved"}
    return {
        "evaluation": "babilong",
        "parameters": loaded.fingerprint,
        "tokenizer": loaded.tokenizer.fingerprint(),
        "segment_length": config.trained_segment_length,
        "dtype": config.train.dtype,
        "seed": config.train.seed,
        "book_files": _describe(books),
        "contents": [content_digest(path) for path in books],
        **settings.model_dump(mode="json", exclude={"tasks", "lengths", "samples"} | unused),
    }


def _describe(files: Sequence[AnyPath]) -> str:
    return ", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in files)


def _summarise(cell: _Cell, results: ResultLog) -> Result:
    records = [results[cell.key(index)] for index in range(cell.count)]
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
    """Mean accuracy over qa1 to qa5, by length, where all five were asked."""
    five = ("qa1", "qa2", "qa3", "qa4", "qa5")
    by_length = {
        length: [c["accuracy"] for c in cells if c["length"] == length and c["task"] in five]
        for length in _lengths(cells)
    }
    return {length: sum(found) / 5 for length, found in by_length.items() if len(found) == 5}


# --- Tables and pictures -------------------------------------------------------------------------------------------


def tables(result: Result) -> list[Table]:
    """Accuracy by task and length, with 95% intervals, for the terminal."""
    cells, lengths = result["cells"], _lengths(result["cells"])
    table = Table(title=f"BABILong accuracy (prompt: {result['settings']['prompt']}), 95% interval in brackets")
    table.add_column("task")
    for length in lengths:
        table.add_column(length, justify="right")
    texts = {(c["task"], c["length"]): f"{c['accuracy']:.0%} ({c['low']:.0%}-{c['high']:.0%})" for c in cells}
    for task in _tasks(cells):
        table.add_row(task, *(texts.get((task, length), "") for length in lengths))
    if means := result["mean_qa1_qa5"]:
        table.add_section()
        table.add_row("mean qa1-qa5", *(f"{means[length]:.1%}" if length in means else "" for length in lengths))
    return [table]


def draw(result: Result, output: AnyPath) -> list[AnyPath]:
    """Draws a heat map of tasks and lengths, and accuracy against length; returns the paths, beside `output`."""
    cells = result["cells"]
    return plots.draw_accuracy(cells, _tasks(cells), _lengths(cells), output)


def _tasks(cells: Sequence[Result]) -> list[str]:
    return sorted({cell["task"] for cell in cells}, key=lambda task: int(task[2:]))


def _lengths(cells: Sequence[Result]) -> list[str]:
    return sorted({cell["length"] for cell in cells}, key=parse_length)
