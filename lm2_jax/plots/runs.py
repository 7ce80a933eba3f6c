"""Curves of one or several runs, from the metrics.jsonl and the summary.json of their run directories."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.records import Record, read_records
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.common.trees import writing

_SMOOTHED = 200  # points: of longer runs, neighbours are averaged
_STYLES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D", "v")


@dataclasses.dataclass(frozen=True)
class Run:
    """Results of a run, from its files.

    Attributes:
      name: for the legend.
      records: of metrics.jsonl, by step.
      accuracy: of summary.json, by context length; empty for an unfinished run or one without questions.
    """

    name: str
    records: Sequence[Record]
    accuracy: Sequence[Mapping[str, Any]]


def read_runs(run_dirs: Sequence[str | AnyPath]) -> list[Run]:
    """Runs by their directories, named by what tells them apart. Raises UserError with all that cannot be used."""
    paths, runs, problems = [to_path(path) for path in run_dirs], [], []
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            records = read_records(path / "metrics.jsonl")
            summary = path / "summary.json"
            accuracy = json.loads(summary.read_text(encoding="utf-8"))["accuracy_by_length"] if summary.exists() else []
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: not a run directory with a sound metrics.jsonl ({error})")
            continue
        if not records:
            problems.append(f"{path}: metrics.jsonl holds no step yet; try again in a while")
        runs.append(Run(name, records, accuracy))
    if problems:
        raise UserError("\n".join(problems))
    return runs


def _names(paths: Sequence[AnyPath]) -> list[str]:
    """The last parts of the paths, as many as make them different."""
    for parts in range(1, 1 + max(len(_parts(path)) for path in paths)):
        names = ["/".join(_parts(path)[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def _parts(path: AnyPath) -> list[str]:
    return str(path).split("/")


# --- Panels --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines that are drawn together.

    Attributes:
      title: above it.
      lines: keys of a record, each with its meaning; a line style for each. Empty: accuracy by context length.
      log: a logarithmic scale.
      fraction: a scale from 0 to 1.
    """

    title: str
    lines: Mapping[str, str]
    log: bool = False
    fraction: bool = False

    def is_empty(self, runs: Sequence[Run]) -> bool:
        """True if no run has values for it."""
        if not self.lines:
            return not any(_in_context(run) for run in runs)
        return not any(_is_number(record, key) for run in runs for record in run.records for key in self.lines)


PANELS = {
    "loss": Panel("Loss", {"loss": "loss", "validation_loss": "validation (nats a token)"}, log=True),
    "answers": Panel(
        "Share of answers right", {"accuracy": "in training", "validation_accuracy": "validation"}, fraction=True
    ),
    "length": Panel("Accuracy by context length", {}, fraction=True),
    "lr": Panel("Learning rate", {"lr": "learning rate"}),
    "throughput": Panel("Throughput, tokens a second", {"tokens_per_second": "tokens a second"}),
    "time": Panel("Seconds a step", {"step_seconds": "in all", "data_seconds": "waiting for data"}),
    "use": Panel("Use of the devices", {"mfu": "MFU", "goodput": "goodput"}, fraction=True),
    "gradient": Panel("Gradient norm", {"grad_norm": "before clipping"}, log=True),
    "memory": Panel("Norm of a memory slot", {"memory_norm": "mean", "memory_norm_max": "largest"}),
    "gates": Panel(
        "Memory gates, mean", {"gate_forget": "forget", "gate_input": "input", "gate_output": "output"}, fraction=True
    ),
}

AXES = {"step": "step", "tokens": "tokens read", "time": "minutes since the run's first step"}


def plot_runs(path: str | AnyPath, runs: Sequence[Run], panels: Sequence[str] = tuple(PANELS), x: str = "step") -> None:
    """One PNG with a panel for everything that the runs have; a colour is a run, a line style one of several values.

    Args:
      panels: names of PANELS; one that no run has anything for is left out.
      x: the horizontal axis, a name of AXES.

    Raises UserError if no panel is left.
    """
    from matplotlib.figure import Figure  # slow to import; and without pyplot, a notebook's own pictures stay its own

    drawn_panels = [PANELS[name] for name in panels if not PANELS[name].is_empty(runs)]
    if not drawn_panels:
        raise UserError(f"the runs have nothing for the panels {', '.join(panels)}")
    columns = 2 if len(drawn_panels) == 4 else min(len(drawn_panels), 3)
    rows = -(-len(drawn_panels) // columns)
    figure = Figure((5 * columns, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, drawn_panels, strict=False):
        if panel.lines:
            _draw_lines(axis, panel.lines, runs, x)
        else:
            _draw_accuracy(axis, runs)
        axis.set_title(panel.title, fontsize=11)
        axis.set_yscale("log" if panel.log else "linear")
        if panel.fraction:
            axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(drawn_panels) :]:
        axis.set_axis_off()
    with writing(to_path(path)) as file:
        figure.savefig(file, dpi=110)


def _draw_lines(axis: Any, values: Mapping[str, str], runs: Sequence[Run], x: str) -> None:
    """A line for every value of every run that has it."""
    drawn: dict[str, str] = {}
    for number, run in enumerate(runs):
        first = run.records[0].get("time", 0)
        label: str | None = run.name
        for (key, meaning), style in zip(values.items(), _STYLES, strict=False):
            records = [record for record in run.records if _is_number(record, key)]
            points = [((r["time"] - first) / 60 if x == "time" else r[x], r[key]) for r in records]
            if points:
                axis.plot(*zip(*_averaged(points), strict=True), style, color=f"C{number}", linewidth=1.2, label=label)
                drawn[style], label = meaning, None
    if len(drawn) > 1:
        for style, meaning in drawn.items():
            axis.plot([], [], style, color="grey", label=meaning)
    axis.set_xlabel(AXES[x])


def _draw_accuracy(axis: Any, runs: Sequence[Run]) -> None:
    """Accuracy by context length, with 95% intervals; a line style and a mark for each set of questions."""
    ticks: set[int] = set()
    sets = dict.fromkeys(cell["questions"] for run in runs for cell in _in_context(run))
    styles = dict(zip(sets, itertools.product(_MARKS, _STYLES), strict=False))
    for number, run in enumerate(runs):
        label: str | None = run.name
        for name, (mark, style) in styles.items():
            cells = [cell for cell in _in_context(run) if cell["questions"] == name]
            if not cells:
                continue
            tokens, middle, low, high = ([c[key] for c in cells] for key in ("tokens", "accuracy", "low", "high"))
            axis.plot(tokens, middle, style, marker=mark, markersize=4, color=f"C{number}", label=label)
            axis.fill_between(tokens, low, high, color=f"C{number}", alpha=0.2)
            ticks |= set(tokens)
            label = None
    if len(styles) > 1:
        for name, (mark, style) in styles.items():
            axis.plot([], [], style, marker=mark, markersize=4, color="grey", label=name)
    trained = {max(r["segments"] * r["segment_length"] for r in run.records) for run in runs if run.accuracy}
    if len(trained) == 1:
        axis.axvline(*trained, color="grey", linestyle=":", label="longest in training")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axis.minorticks_off()
    axis.set_xlabel("tokens of context")


def _in_context(run: Run) -> list[Mapping[str, Any]]:
    """The accuracies at lengths above 0, where questions stand alone."""
    return [cell for cell in run.accuracy if cell["segments"]]


def _is_number(record: Record, key: str) -> bool:
    return isinstance(record.get(key), int | float) and math.isfinite(record[key])


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = max(1, len(points) // _SMOOTHED)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
