"""Trains the cells of a study in processes of their own, and keeps their results."""

from __future__ import annotations

import concurrent.futures
import fnmatch
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.common.progress import clock
from lm2_jax.common.records import read_records
from lm2_jax.config import dump_config, parse_config, replace
from lm2_jax.study.cells import Cell, Files, with_files
from lm2_jax.study.results import Result, curve, write_result


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
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                if cores:
                    os.sched_setaffinity(process.pid, cores)
                code = process.wait()
        finally:
            self._cores.put(cores)
        if code:
            raise TrainingFailed(f"cell {cell.name} ended with {code}; see {run_dir / 'log.txt'}")
        result = read_result(cell, run_dir, time.monotonic() - began)
        write_result(self._file(cell), result)
        print(f"{cell.name}: {describe(result)}", flush=True)
        return True


def read_result(cell: Cell, run_dir: Path, seconds: float) -> Result:
    """The result of a run: its config, its table, and its curves as some 60 means."""
    from lm2_jax.model.sizes import memory_size

    summary = json.loads((run_dir / "summary.json").read_text())
    records = read_records(run_dir / "metrics.jsonl")
    validated = [r["validation_accuracy"] for r in records if r.get("validation_accuracy") is not None]
    names = ["step", "stage", "accuracy", *sorted(name for name in records[-1] if name.startswith("gate_"))]
    return {
        "labels": dict(cell.labels),
        "parameters": summary["parameters"],
        "memory_size": memory_size(cell.config),
        "tokens": summary["tokens"],
        "seconds": round(seconds),
        "validation_accuracy": validated[-1] if validated else None,
        "accuracy_by_length": summary["accuracy_by_length"],
        "trained_segments": cell.unit // cell.config.trained_segment_length,
        "curves": {name: curve(records, name) for name in names},
        "config": cell.config.model_dump(mode="json"),
    }


def describe(result: Result) -> str:
    """Describes a result in one line."""
    cells = [f"{cell['segments']}: {cell['accuracy']:.1%}" for cell in result["accuracy_by_length"]]
    return f"{clock(result['seconds'])}, accuracy after segments {', '.join(cells)}"
