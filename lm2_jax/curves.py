"""Curves of one or several runs, from the metrics.jsonl and the summary.json of their run directories."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm2_jax.errors import UserError
from lm2_jax.reporting import Record, read_records

_SMOOTHED = 200  # points: of longer runs, neighbours are averaged
_STYLES = ("-", "--", ":")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run wrote.

    Attributes:
      name: for the legend.
      records: of metrics.jsonl, by step.
      accuracy: of summary.json, by context length; empty for an unfinished run or one without questions.
    """

    name: str
    records: Sequence[Record]
    accuracy: Sequence[Mapping[str, Any]]


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Runs by their directories, named by what tells them apart. Raises UserError with all that cannot be used."""
    paths, runs, problems = [Path(path) for path in run_dirs], [], []
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            records = read_records(path / "metrics.jsonl")
            summary = path / "summary.json"
            accuracy = json.loads(summary.read_text(encoding="utf-8"))["accuracy_by_length"] if summary.exists() else []
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: no run directory with a sound metrics.jsonl ({error})")
            continue
        if not records:
            problems.append(f"{path}: metrics.jsonl holds no step yet; try again in a while")
        runs.append(Run(name, records, accuracy))
    if problems:
        raise UserError("\n".join(problems))
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as make them different."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


# --- Panels --------------------------------------------------------------------------------------------------------


def _loss(axis: Any, runs: Sequence[Run], x: str) -> bool:
    found = _lines(axis, runs, x, {"loss": "loss", "validation_loss": "validation (nats a token)"})
    axis.set_yscale("log")
    return found


def _answers(axis: Any, runs: Sequence[Run], x: str) -> bool:
    axis.set_ylim(0, 1.02)
    return _lines(axis, runs, x, {"accuracy": "in training", "validation_accuracy": "validation"})


def _length(axis: Any, runs: Sequence[Run], _: str) -> bool:
    drawn = False
    for number, run in enumerate(runs):
        for name, style in zip(dict.fromkeys(cell["questions"] for cell in run.accuracy), _STYLES, strict=False):
            cells = [cell for cell in run.accuracy if cell["questions"] == name and cell["segments"]]
            tokens = [cell["tokens"] for cell in cells]
            label = run.name if style == "-" else None
            axis.plot(tokens, [c["accuracy"] for c in cells], style, marker="o", ms=4, color=f"C{number}", label=label)
            axis.fill_between(
                tokens, [c["low"] for c in cells], [c["high"] for c in cells], color=f"C{number}", alpha=0.2
            )
            drawn = True
    trained = {max(r["segments"] * r["segment_length"] for r in run.records) for run in runs if run.accuracy}
    if len(trained) == 1:
        axis.axvline(*trained, color="grey", linestyle=":", label="longest in training")
    ticks = sorted({cell["tokens"] for run in runs for cell in run.accuracy if cell["segments"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set(ylim=(0, 1.02), xlabel="tokens of context")
    return drawn


def _rate(axis: Any, runs: Sequence[Run], x: str) -> bool:
    return _lines(axis, runs, x, {"lr": "learning rate"})


def _throughput(axis: Any, runs: Sequence[Run], x: str) -> bool:
    return _lines(axis, runs, x, {"tokens_per_second": "tokens a second"})


def _gradient(axis: Any, runs: Sequence[Run], x: str) -> bool:
    axis.set_yscale("log")
    return _lines(axis, runs, x, {"grad_norm": "norm, before clipping"})


def _norm(axis: Any, runs: Sequence[Run], x: str) -> bool:
    return _lines(axis, runs, x, {"memory_norm": "mean", "memory_norm_max": "largest"})


def _gates(axis: Any, runs: Sequence[Run], x: str) -> bool:
    axis.set_ylim(0, 1.02)
    return _lines(axis, runs, x, {"gate_forget": "forget", "gate_input": "input", "gate_output": "output"})


PANELS: dict[str, tuple[str, Callable[[Any, Sequence[Run], str], bool]]] = {
    "loss": ("Loss", _loss),
    "answers": ("Share of answers right", _answers),
    "length": ("Accuracy by context length", _length),
    "lr": ("Learning rate", _rate),
    "throughput": ("Throughput, tokens a second", _throughput),
    "gradient": ("Gradient norm", _gradient),
    "memory": ("Norm of a memory slot", _norm),
    "gates": ("Memory gates, mean", _gates),
}
"""Name to title and what draws it; that gives whether any run has anything to draw."""

AXES = {"step": "step", "tokens": "tokens read", "time": "minutes since the run's first step"}


def plot_runs(path: str | Path, runs: Sequence[Run], panels: Sequence[str] = tuple(PANELS), x: str = "step") -> None:
    """One PNG with a panel for everything that the runs have; a colour is a run, a line style one of several values.

    panels: names of PANELS. x: a name of AXES.
    """
    from matplotlib.figure import Figure  # slow to import; and without pyplot, a notebook's own pictures stay its own

    shown = [name for name in panels if PANELS[name][1](Figure().subplots(), runs, x)]
    if not shown:
        raise UserError(f"the runs have nothing for the panels {', '.join(panels)}")
    columns = min(len(shown), 3 if len(shown) != 4 else 2)
    rows = -(-len(shown) // columns)
    figure = Figure((5 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, shown, strict=False):
        title, draw = PANELS[name]
        axis.set_xlabel(AXES[x])
        draw(axis, runs, x)
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _lines(axis: Any, runs: Sequence[Run], x: str, values: Mapping[str, str]) -> bool:
    """A line for every value of every run that has it. values: key to what it is, for the legend."""
    drawn: dict[str, str] = {}
    for number, run in enumerate(runs):
        first = run.records[0].get("time", 0)
        label: str | None = run.name
        for (key, meaning), style in zip(values.items(), _STYLES, strict=False):
            points = [((r["time"] - first) / 60 if x == "time" else r[x], r[key]) for r in run.records if _is(r, key)]
            if points:
                axis.plot(*zip(*_averaged(points), strict=True), style, color=f"C{number}", linewidth=1.2, label=label)
                drawn[style], label = meaning, None
    if len(drawn) > 1:
        for style, meaning in drawn.items():
            axis.plot([], [], style, color="grey", label=meaning)
    return bool(drawn)


def _is(record: Record, key: str) -> bool:
    return isinstance(record.get(key), int | float) and math.isfinite(record[key])


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = max(1, len(points) // _SMOOTHED)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
