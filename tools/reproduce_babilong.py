"""Does memory pay? Trains lm2, rmt, none and full attention alike, and compares them on bAbI facts in long contexts.

    python tools/reproduce_babilong.py --output runs/study --preset smoke

Every cell (a model, a setting, a seed) is one run of `lm2_jax.train` on all tasks at once, in a process of its own; its
result is kept in OUTPUT/cells as JSON, so an interrupted study goes on where it stopped. Tables and pictures are drawn
from those files alone (--report draws them again, without training). Models have equal parameters: the width of the
feed-forward layers makes up for what a memory costs. lm2 and rmt have memories of equal size.
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
from babilong_report import best_setting, write_report

from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.files import write_atomically
from lm2_jax.common.progress import clock
from lm2_jax.common.records import read_records
from lm2_jax.config import Config, dump_config, load_config, parse_config, replace
from lm2_jax.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


# --- What is compared ----------------------------------------------------------------------------------------------

Changes = Mapping[str, Mapping[str, Any]]  # of a config, by section


@dataclasses.dataclass(frozen=True)
class Preset:
    """The size of a study.

    Attributes:
      config: file in configs/ that every cell starts from.
      base: changes for every cell.
      models: changes by name; all have as many parameters as `lm2`, and rmt has as large a memory.
      settings: changes that every model's learning rate and training window are chosen from, with the first seed. A
        model with a window of its own has those of the learning rate alone.
      seeds: of the comparison.
      longer: models that are trained twice as long, too, in their best setting, and with how many of the seeds.
      ablations: changes of lm2 by name, for the table of its parts; all have as many parameters as lm2.
      ablation_base: changes for those cells.
      ablation_seeds: of those cells.
      d_ff_multiple: what the width of feed-forward layers is a multiple of where it makes up for a memory.
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
        config="babilong_study.yaml",
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
        config="babilong_study.yaml",
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
        config="lm2_1b7.yaml",
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


# --- Cells ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      labels: what it is in the study: phase, model, seed, and what was chosen for it.
      config: complete, but for its run directory.
      unit: tokens that the lengths of contexts are multiples of.
    """

    labels: Mapping[str, Any]
    config: Config
    unit: int

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join(re.sub(r"[^\w.]+", "_", str(value)) for value in self.labels.values())


class Plan:
    """The cells of a preset."""

    def __init__(self, preset: Preset, files: Files) -> None:
        """files: `babi` is asked about in the comparison, and weights in `start` are what its cells start from."""
        self._preset, self._files = preset, files
        from lm2_jax.tokenizer import check_vocabulary  # takes a second, which --help should not

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
        """The setting that was best for it, or the first while the grid has none of its results."""
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
        from lm2_jax.model.sizes import parameters, with_parameters  # jax takes seconds, which --help should not

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


class Program:
    """Trains cells, several at a time, each on its share of the cores, and keeps their results."""

    def __init__(self, output: Path, files: Files, workers: int, only: str, until: float) -> None:
        """only: a pattern of cell names; until: no cell begins after time.monotonic()."""
        self._output, self._files, self._only, self._until = output, files, only, until
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._places: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for worker in range(workers):
            self._places.put(cores[worker::workers])
        self._workers = workers

    def results(self, cells: Iterable[Cell]) -> list[Result]:
        """What is there of the cells' results after training those that are wanted."""
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
        """Whether there was time left to train it."""
        if time.monotonic() > self._until:
            return False
        config_file = self.write_config(cell)
        run_dir = config_file.parent
        place, began = self._places.get(), time.monotonic()
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}  # fewer page faults
        try:
            with (run_dir / "log.txt").open("a") as log:
                command = [sys.executable, "-m", "lm2_jax.train", "--config", str(config_file)]
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                if place:
                    os.sched_setaffinity(process.pid, place)
                code = process.wait()
        finally:
            self._places.put(place)
        if code:
            raise TrainingFailed(f"cell {cell.name} ended with {code}; see {run_dir / 'log.txt'}")
        result = read_result(cell, run_dir, time.monotonic() - began)
        self._file(cell).parent.mkdir(exist_ok=True)
        write_atomically(self._file(cell), json.dumps(result, indent=1) + "\n")
        print(f"{cell.name}: {describe(result)}", flush=True)
        return True


def read_result(cell: Cell, run_dir: Path, seconds: float) -> Result:
    """What is kept of a run: its config, its table, and its curves as some 60 means."""
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
    """A line on a result."""
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
    """The config of a cell, its files where they are. Raises UserError if one is not given."""

    def place(path: str) -> str:
        for name in _OPTIONS:
            if (mark := f"{{{name}}}") in path:
                if name not in files:
                    raise UserError(f"--{name} is missing; the cells of this preset read it")
                path = path.replace(mark, str(files[name]))
        return path

    return replace(
        config,
        eval={"path": config.eval.path and [place(path) for path in config.eval.path]},
        data={"background": config.data.background and [place(path) for path in config.data.background]},
        tokenizer={"path": config.tokenizer.path and place(config.tokenizer.path)},
        train={"init_from": config.train.init_from and place(config.train.init_from)},
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
        print(write_report(arguments.output))


def run(preset: Preset, arguments: argparse.Namespace) -> None:
    """Trains what is missing: the comparison's grid, its other seeds, longer runs, and the ablations."""
    files = {name: path.resolve() for name in _OPTIONS if (path := getattr(arguments, name))}
    if "babi" in files and not files["babi"].is_dir():
        raise UserError(f"--babi: {files['babi']} is no directory; give the one with qa1_..._test.txt")
    plan = Plan(preset, files)
    until = time.monotonic() + arguments.hours * 3600
    runner = Program(arguments.output, files, arguments.workers, arguments.only, until)
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
