"""Trains lm2, rmt, none and full attention alike, and compares them on bAbI facts in long contexts.

    python tools/reproduce_babilong.py --output runs/study --preset smoke

Every cell (a model, a setting, a seed) is one run of `lm2_jax.train` on all tasks at once, in a process of its own; its
result is kept in OUTPUT/cells as JSON, so an interrupted study resumes. Tables and pictures are drawn from those files
alone (--report redraws them, without training). Models have equal parameters: the width of the feed-forward layers
compensates for what a memory costs. lm2 and rmt have memories of equal size.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
from babilong_presets import PRESETS, Changes, Preset
from babilong_results import best_setting

from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.files import write_atomically
from lm2_jax.common.progress import clock
from lm2_jax.common.records import read_records
from lm2_jax.config import Config, dump_config, load_config, parse_config, replace
from lm2_jax.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


# --- Cells ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      labels: its position in the study: phase, model, seed, and the setting selected for it.
      config: complete, but for its run directory.
      unit: tokens that the lengths of contexts are multiples of.
    """

    labels: Mapping[str, Any]
    config: Config
    unit: int

    @property
    def name(self) -> str:
        """Stem of its files' names."""
        return "-".join(re.sub(r"[^\w.]+", "_", str(value)) for value in self.labels.values())


class Plan:
    """The cells of a preset."""

    def __init__(self, preset: Preset, files: Files) -> None:
        """files: the comparison asks about `babi`, and its cells start from the weights in `start`."""
        self._preset, self._files = preset, files
        from lm2_jax.tokenizer import check_vocabulary  # imported late so that --help stays fast

        config = _changed(load_config(ROOT / "configs" / preset.config), preset.base)
        self._config = check_vocabulary(config, load_tokenizer(with_files(config, files).tokenizer))

    def ablations(self) -> Iterator[Cell]:
        """lm2 and its variants."""
        for seed in self._preset.ablation_seeds:
            for name, changes in self._preset.ablations.items():
                yield self._cell(
                    {"phase": "ablation", "model": name, "seed": seed}, self._preset.ablation_base, changes
                )

    def grid(self) -> Iterator[Cell]:
        """Every model in every setting, with the first seed."""
        for setting in self._preset.settings:
            for model in self._preset.models:
                if not ("data" in self._preset.models[model] and "data" in self._preset.settings[setting]):
                    yield self._compared(model, setting, self._preset.seeds[0])

    def comparison(self, grid: Sequence[Result]) -> Iterator[Cell]:
        """The other seeds of every model, in the first setting and in the one that was best of those in the grid."""
        first = next(iter(self._preset.settings))
        for seed in self._preset.seeds[1:]:
            for model in self._preset.models:
                for setting in dict.fromkeys((first, self._best(model, grid))):
                    yield self._compared(model, setting, seed)

    def longer(self, grid: Sequence[Result]) -> Iterator[Cell]:
        """Models in their best setting, every stage and the whole of twice as many steps."""
        for model, seeds in self._preset.longer.items():
            for seed in self._preset.seeds[:seeds]:
                cell = self._compared(model, self._best(model, grid), seed)
                train = cell.config.model_dump()["train"]
                for stage in train["curriculum"]:
                    stage["steps"] = stage["steps"] and 2 * stage["steps"]
                config = replace(cell.config, train={"steps": 2 * train["steps"], "curriculum": train["curriculum"]})
                yield dataclasses.replace(cell, labels={**cell.labels, "phase": "longer"}, config=config)

    def _best(self, model: str, grid: Sequence[Result]) -> str:
        """The model's best setting, or the first while the grid has none of its results."""
        own = [result for result in grid if result["labels"]["model"] == model]
        return best_setting(own) if own else next(iter(self._preset.settings))

    def _compared(self, model: str, setting: str, seed: int) -> Cell:
        labels = {"phase": "comparison", "model": model, "setting": setting, "seed": seed}
        cell = self._cell(labels, {}, self._preset.settings[setting], self._preset.models[model])
        config = with_questions(cell.config, self._files.get("babi"))
        if "start" in self._files:
            config = replace(config, train={"init_from": f"{{start}}/{config.memory.kind}"})
        return dataclasses.replace(cell, config=config)

    def _cell(self, labels: Mapping[str, Any], base: Changes, *changes: Changes) -> Cell:
        from lm2_jax.model.sizes import parameters, with_parameters  # imported late so that --help stays fast

        standard = _changed(self._config, base)
        config = _changed(self._config, base, *changes, {"train": {"seed": labels["seed"]}})
        config = with_parameters(config, parameters(standard), self._preset.d_ff_multiple)
        window = standard.stages[-1]
        return Cell(labels, config, window.segments * window.segment_length)


def _changed(config: Config, *changes: Changes) -> Config:
    merged: dict[str, dict[str, Any]] = {}
    for change in changes:
        for section, keys in change.items():
            merged.setdefault(section, {}).update(keys)
    return replace(config, **merged)


# --- Running -------------------------------------------------------------------------------------------------------


class CellRunner:
    """Trains cells, several at a time, each on its share of the cores, and keeps their results."""

    def __init__(self, output: Path, files: Files, workers: int, only: str, until: float) -> None:
        """only: a pattern of cell names; until: no cell begins after time.monotonic()."""
        self._output, self._files, self._only, self._until = output, files, only, until
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._cores: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for worker in range(workers):
            self._cores.put(cores[worker::workers])
        self._workers = workers

    def results(self, cells: Iterable[Cell]) -> list[Result]:
        """The results that exist after training the wanted cells."""
        cells = list(cells)
        waiting = [cell for cell in cells if not self._read(cell) and fnmatch.fnmatch(cell.name, self._only)]
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            for number, trained in enumerate(pool.map(self._train, waiting), 1):
                if trained:
                    left = (time.monotonic() - began) / number * (len(waiting) - number)
                    print(f"{number}/{len(waiting)} cells, about {clock(left)} left", flush=True)
        return [result for cell in cells if (result := self._read(cell))]

    def _read(self, cell: Cell) -> Result | None:
        """The cell's result, if it is there. Raises UserError if another study left it."""
        if not self._file(cell).exists():
            return None
        result = json.loads(self._file(cell).read_text())
        config = parse_config(json.dumps(result["config"]))
        if replace(config, train={"unroll": cell.config.train.unroll}) != cell.config:  # which changes rounding alone
            raise UserError(f"{self._file(cell)} is of another config; give another --output, or remove it")
        return result

    def _file(self, cell: Cell) -> Path:
        return self._output / "cells" / f"{cell.name}.json"

    def write_config(self, cell: Cell) -> Path:
        """Writes the config that the cell is trained with into its run directory."""
        run_dir = self._output / "runs" / cell.name
        run_dir.mkdir(parents=True, exist_ok=True)
        config_file = run_dir / "cell.yaml"
        config = replace(with_files(cell.config, self._files), train={"run_dir": str(run_dir)})
        config_file.write_text(dump_config(config), encoding="utf-8")
        return config_file

    def _train(self, cell: Cell) -> bool:
        """Trains a cell; False if there was no time left."""
        if time.monotonic() > self._until:
            return False
        config_file = self.write_config(cell)
        run_dir = config_file.parent
        cores, began = self._cores.get(), time.monotonic()
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}  # fewer page faults
        try:
            with (run_dir / "log.txt").open("a") as log:
                command = [sys.executable, "-m", "lm2_jax.train", "--config", str(config_file)]
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                if cores:
                    os.sched_setaffinity(process.pid, cores)
                code = process.wait()
        finally:
            self._cores.put(cores)
        if code:
            raise TrainingFailed(f"cell {cell.name} ended with {code}; see {run_dir / 'log.txt'}")
        result = read_result(cell, run_dir, time.monotonic() - began)
        self._file(cell).parent.mkdir(exist_ok=True)
        write_atomically(self._file(cell), json.dumps(result, indent=1) + "\n")
        print(f"{cell.name}: {describe(result)}", flush=True)
        return True


def read_result(cell: Cell, run_dir: Path, seconds: float) -> Result:
    """The result of a run: its config, its table, and its curves as some 60 means."""
    from lm2_jax.model.sizes import memory_size

    summary = json.loads((run_dir / "summary.json").read_text())
    records = read_records(run_dir / "metrics.jsonl")
    validated = [r["validation_accuracy"] for r in records if r.get("validation_accuracy") is not None]
    every = max(1, len(records) // 60)
    names = ["step", "stage", "accuracy", *sorted(name for name in records[-1] if name.startswith("gate_"))]
    curves = {}
    for name in names:
        chunks = [records[start : start + every] for start in range(0, len(records), every)]
        values = [[r[name] for r in chunk if r.get(name) is not None] for chunk in chunks]
        mean = [sum(v) / len(v) if v else None for v in values]
        curves[name] = [None if v is None else round(v, 4) for v in mean]
    return {
        "labels": dict(cell.labels),
        "parameters": summary["parameters"],
        "memory_size": memory_size(cell.config),
        "tokens": summary["tokens"],
        "seconds": round(seconds),
        "validation_accuracy": validated[-1] if validated else None,
        "accuracy_by_length": summary["accuracy_by_length"],
        "trained_segments": cell.unit // cell.config.trained_segment_length,
        "curves": curves,
        "config": cell.config.model_dump(mode="json"),
    }


def describe(result: Result) -> str:
    """Describes a result in one line."""
    cells = [f"{cell['segments']}: {cell['accuracy']:.1%}" for cell in result["accuracy_by_length"]]
    return f"{clock(result['seconds'])}, accuracy after segments {', '.join(cells)}"


# --- Files that cells read -----------------------------------------------------------------------------------------

_OPTIONS = ("babi", "background", "tokenizer", "start")  # in the config of a cell `{babi}` stands for what --babi names
Files = Mapping[str, Path]  # those that were given, by option


def with_questions(config: Config, babi: Path | None) -> Config:
    """The config, asking about bAbI's own stories of its tasks besides the generator's.

    Nobody trains on them: a qa2 of 2,000 stories is learnt by heart. So a task's training file is asked about where
    there is no qa1_..._test.txt of it. Files are named from `{babi}` on; `with_files` says where that is.
    """
    files: list[Path] = []
    for task in config.data.stories.tasks if babi else ():
        files += sorted(babi.glob(f"{task}_*_test.txt")) or sorted(babi.glob(f"{task}_*.txt"))
    return replace(config, eval={"path": [f"{{babi}}/{file.name}" for file in files] or None})


def with_files(config: Config, files: Files) -> Config:
    """The config of a cell with the paths of its files. Raises UserError if one is not given."""

    def resolve(path: str) -> str:
        for name in _OPTIONS:
            if (mark := f"{{{name}}}") in path:
                if name not in files:
                    raise UserError(f"--{name} is missing; the cells of this preset read it")
                path = path.replace(mark, str(files[name]))
        return path

    return replace(
        config,
        eval={"path": config.eval.path and [resolve(path) for path in config.eval.path]},
        data={"background": config.data.background and [resolve(path) for path in config.data.background]},
        tokenizer={"path": config.tokenizer.path and resolve(config.tokenizer.path)},
        train={"init_from": config.train.init_from and resolve(config.train.init_from)},
    )


# --- The command ---------------------------------------------------------------------------------------------------


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="cells, tables and pictures go here")
    parser.add_argument("--preset", choices=PRESETS, default="smoke", help="the size of the study")
    parser.add_argument("--babi", type=Path, metavar="DIR", help="bAbI v1.2 files (en-10k); without: the generator")
    parser.add_argument("--background", type=Path, metavar="FILE", help="preset full: text to scatter facts in")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="preset full: Llama 3's tokenizer.model")
    parser.add_argument("--start", type=Path, metavar="DIR", help="start from the weights DIR/lm2, DIR/rmt, DIR/none")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time; they share the cores")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells to train, such as 'ablation-*'")
    parser.add_argument("--hours", type=float, default=1e9, metavar="H", help="begin no cell after so many hours")
    parser.add_argument("--report", action="store_true", help="train nothing; draw tables and pictures again")
    parser.add_argument("--write-configs", action="store_true", help="train nothing; write the configs of the grid")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    arguments.output = arguments.output.resolve()  # cells run in the repository's directory
    if not arguments.report:
        run(preset, arguments)
    if not arguments.write_configs:
        from babilong_report import write_report  # imported late so that --help stays fast

        print(write_report(arguments.output))


def run(preset: Preset, arguments: argparse.Namespace) -> None:
    """Trains what is missing: the comparison's grid, its other seeds, longer runs, and the ablations."""
    files = {name: path.resolve() for name in _OPTIONS if (path := getattr(arguments, name))}
    if "babi" in files and not files["babi"].is_dir():
        raise UserError(f"--babi: {files['babi']} is not a directory; give the one with qa1_..._test.txt")
    plan = Plan(preset, files)
    until = time.monotonic() + arguments.hours * 3600
    runner = CellRunner(arguments.output, files, arguments.workers, arguments.only, until)
    if arguments.write_configs:
        for cell in plan.grid():
            print(runner.write_config(cell))
        return
    grid = runner.results(plan.grid())
    runner.results(plan.comparison(grid))
    runner.results(plan.longer(grid))
    runner.results(plan.ablations())


if __name__ == "__main__":
    run_command(main)
