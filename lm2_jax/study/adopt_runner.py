"""Trains and asks the cells of docs/adopt.md, each in processes of its own, and keeps their results as JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.common.records import read_records
from lm2_jax.config import dump_config, parse_config, replace
from lm2_jax.convert import directory
from lm2_jax.study.adopt import CHAPTERS, Cell
from lm2_jax.study.results import curve, write_result


def run_cell(cell: Cell, start: Path, held_out: list[str], output: Path) -> dict[str, Any]:
    """The cell's result; what is there already is not done again, and a leg that was stopped is resumed.

    held_out: books that no cell trains on, for the part `books`. Raises UserError if another study left the result.
    """
    file = output / "cells" / f"{cell.name}.json"
    if not file.exists():
        weights, tokens = start, 0
        for number, leg in enumerate(cell.legs, 1):
            run_dir = output / "runs" / f"{cell.name}-{number}"
            run_dir.mkdir(parents=True, exist_ok=True)
            config = replace(leg, train={"run_dir": str(run_dir), "init_from": str(weights)})
            (run_dir / "leg.yaml").write_text(dump_config(config), encoding="utf-8")
            _run("lm2_jax.train", "--config", str(run_dir / "leg.yaml"), log=run_dir / "log.txt")
            weights = run_dir
            tokens += json.loads((run_dir / "summary.json").read_text())["tokens"]
        measured = _loss(weights, held_out) if cell.part == "books" else _answers(weights)
        labels = {"part": cell.part, "trained": cell.trained, "seed": cell.seed, "tokens": tokens}
        write_result(file, labels | measured | {"legs": [leg.model_dump(mode="json") for leg in cell.legs]})
    result = json.loads(file.read_text())
    if [parse_config(json.dumps(leg)) for leg in result["legs"]] != list(cell.legs):
        raise UserError(f"{file} is of another config; give another --output, or remove it")
    return result


def run_base(start: Path, like: Cell, held_out: list[str], output: Path) -> dict[str, Any]:
    """The result of the pretrained model as it is, on books, with the window and the segments of the cell `like`."""
    file, windowed = output / "cells" / "books-base.json", output / "runs" / "books-base"
    if not file.exists():
        config, model = like.legs[-1], directory.read(start)
        window = config.model.model_dump(include={"window", "sinks", "max_distance"})
        segments = config.data.model_dump(include={"segment_length", "segments_per_window"})
        if not windowed.exists():
            with directory.new_directory(windowed) as partial:
                windowed_model = dataclasses.replace(model, config=replace(model.config, model=window, data=segments))
                directory.write(windowed_model, partial, lambda items, title: items)
        write_result(file, {"part": "books", "trained": "nothing", "seed": 0, "tokens": 0} | _loss(windowed, held_out))
    return json.loads(file.read_text())


def _answers(run_dir: Path) -> dict[str, Any]:
    """Accuracy by length, which training ends with, and the curve of the accuracy of the answers trained on."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "accuracy_by_length": summary["accuracy_by_length"],
        "training_accuracy": curve(read_records(run_dir / "metrics.jsonl"), "accuracy"),
    }


def _loss(run_dir: Path, held_out: list[str]) -> dict[str, Any]:
    """Every document's sums of nats, which differences between two cells are paired by."""
    output = run_dir.with_suffix(".perplexity.json")
    settings = {"eval.perplexity.path": held_out, "eval.perplexity.document_separator": CHAPTERS}
    arguments = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    files = ("--checkpoint", str(run_dir), "--output", str(output))
    _run(
        *("lm2_jax.evaluate", "--task", "perplexity", *files, "--set=data.batch_size=8", *arguments),
        log=run_dir.with_suffix(".log"),
    )
    documents = read_records(output.with_suffix(".finished.jsonl"))[1:]  # the first line says what was evaluated
    summary = json.loads(output.read_text())
    return {
        "segment_length": summary["segment_length"],
        "documents": sorted(documents, key=lambda record: record["document"]),
    }


def _run(module: str, *arguments: str, log: Path) -> None:
    """Runs a command of the package. Raises TrainingFailed, naming the log, if it fails."""
    with log.open("a") as lines:
        code = subprocess.call([sys.executable, "-m", module, *arguments], stdout=lines, stderr=subprocess.STDOUT)
    if code:
        raise TrainingFailed(f"{module} ended with {code}; see {log}")
