"""Results of a study's cells: as files, by set of questions and length, and what is computed from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import write_atomically
from lm2_jax.common.records import Record

Result = Mapping[str, Any]

# Two-sided 95% quantiles of Student's t by degrees of freedom; those in between take the quantile of fewer
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_T95 |= {10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}
BABI = " (bAbI's file)"


def read_results(output: Path) -> list[Result]:
    """The results in output/cells, in the order of their names. Raises UserError if there are none."""
    results = [json.loads(path.read_text()) for path in sorted((output / "cells").glob("*.json"))]
    if not results:
        raise UserError(f"--output: {output / 'cells'} holds no result yet; there is nothing to report")
    return results


def write_result(file: Path, result: Result) -> None:
    """Writes a cell's JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result, indent=1) + "\n")


def curve(records: Sequence[Record], name: str) -> list[float | None]:
    """A run's values of this name as some 60 means, in the order of steps; None where there is no value."""
    every = max(1, len(records) // 60)
    chunks = [records[start : start + every] for start in range(0, len(records), every)]
    values = [[record[name] for record in chunk if record.get(name) is not None] for chunk in chunks]
    return [round(statistics.fmean(chunk), 4) if chunk else None for chunk in values]


def best_setting(results: Sequence[Result]) -> str:
    """The setting of a model's best result with the first seed, by `mean_to_8x` of the generator's questions.

    Of equally good ones it is the first. (Validation accuracy is that of the windows trained on, which differ.)
    """
    first = min(result["labels"]["seed"] for result in results)
    grid = [result for result in results if result["labels"]["seed"] == first]
    return max(grid, key=_accuracy)["labels"]["setting"]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t (nan for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    quantile = _T95[max(freedom for freedom in _T95 if freedom < len(values))]
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def _accuracy(result: Result) -> float:
    """The measure by which settings are selected: `mean_to_8x` of the generator's questions."""
    return mean_to_8x(by_set_and_multiple([result]), of_generator(sets_of(result)))


def mean_to_8x(cells: Mapping[tuple[str, float], list[float]], names: Sequence[str]) -> float:
    """Mean accuracy on sets of questions over 1 to 8 times the trained length."""
    return statistics.fmean(
        statistics.fmean(values) for (name, multiple), values in cells.items() if name in names and 1 <= multiple <= 8
    )


def means_of_seeds(results: Sequence[Result], names: Sequence[str]) -> dict[int, float]:
    """`mean_to_8x` of a model's runs in one setting, by their seeds."""
    ordered = sorted(results, key=lambda result: result["labels"]["seed"])
    return {run["labels"]["seed"]: mean_to_8x(by_set_and_multiple([run]), names) for run in ordered}


def by_set_and_multiple(results: Sequence[Result]) -> dict[tuple[str, float], list[float]]:
    """Accuracies over seeds by (set of questions, context as a multiple of the longest in training)."""
    found: dict[tuple[str, float], list[float]] = {}
    for result in results:
        for cell in result["accuracy_by_length"]:
            key = _set(cell["questions"]), cell["segments"] / result["trained_segments"]
            found.setdefault(key, []).append(cell["accuracy"])
    return found


def _set(questions: str) -> str:
    """qa1 for the generator's held-out stories, and another name for those of bAbI's qa1_..._test.txt."""
    return questions.removesuffix(" (generator)") if questions.endswith(")") else questions.split("_")[0] + BABI


def sets_of(result: Result) -> list[str]:
    """Sets of questions of a result, in its order."""
    return list(dict.fromkeys(_set(cell["questions"]) for cell in result["accuracy_by_length"]))


def of_generator(sets: Sequence[str]) -> list[str]:
    """The sets whose questions are the generator's."""
    return [name for name in sets if not name.endswith(BABI)]


def in_order(results: Sequence[Result], label: str) -> list[str]:
    """Distinct values of a label, lm2 first."""
    first = {"lm2": 0, "as it is": 0, "rmt": 1, "none": 2}
    names = dict.fromkeys(result["labels"][label] for result in results)
    return sorted(names, key=lambda name: first.get(name, 3))


def of_model(results: Sequence[Result], model: str) -> list[Result]:
    """The results of one model."""
    return [result for result in results if result["labels"]["model"] == model]


def last_stage(curves: Mapping[str, Sequence[float]]) -> list[int]:
    """Indices into a run's curves that belong to its last stage."""
    last = max(curves["stage"])
    return [index for index, stage in enumerate(curves["stage"]) if stage == last]
