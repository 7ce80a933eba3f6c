"""Pictures of evaluations.

matplotlib is slow to import, so it is imported late; and without pyplot, a notebook's own pictures stay its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm2_jax.common.storage import AnyPath
from lm2_jax.common.trees import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
_POINTS = 100  # of a curve over segments; longer ones are averaged in groups


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _save(figure: Figure, path: AnyPath) -> AnyPath:
    with writing(path) as file:
        figure.savefig(file, dpi=120)
    return path


# --- Perplexity ----------------------------------------------------------------------------------------------------


def draw_loss_by_segment(result: Mapping[str, Any], output: AnyPath) -> list[AnyPath]:
    """One picture beside `output`: the loss against the segment's index, from the JSON of `perplexity.evaluate`."""
    rows = result["by_segment"]
    tokens, means = (np.array([row[name] for row in rows]) for name in ("tokens", "nats_per_token"))
    step = -(-len(rows) // _POINTS)
    first = np.arange(0, len(rows), step)
    grouped = np.add.reduceat(tokens * means, first) / np.add.reduceat(tokens, first)
    figure = _new_figure(7.5, 4.5)
    axis = figure.subplots()
    if step > 1:
        axis.plot(means, color="tab:blue", linewidth=0.4, alpha=0.35, label="one segment")
    label = "one segment" if step == 1 else f"mean of {step} segments"
    axis.plot(first + (step - 1) / 2, grouped, "o-", color="tab:blue", markersize=3, linewidth=1.2, label=label)
    axis.axhline(result["nats_per_token"], color="grey", linestyle=":", label="all tokens")
    axis.set(
        xlabel=f"segment of the document, from 0 ({result['segment_length']} tokens each)",
        ylabel="nats per token",
        title=f"Loss by segment; documents: {result['documents']:,}",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return [_save(figure, output.with_suffix(".png"))]


# --- BABILong ------------------------------------------------------------------------------------------------------


def draw_accuracy(cells: Rows, tasks: Sequence[str], lengths: Sequence[str], output: AnyPath) -> list[AnyPath]:
    """Two pictures beside `output`: a heat map of tasks and lengths, and accuracy against length.

    cells: those of `babilong.evaluate`; the order of tasks and lengths is that of the axes.
    """
    heat_map, curves = output.with_suffix(".heatmap.png"), output.with_suffix(".lengths.png")
    return [
        _save(_heat_map(cells, tasks, lengths), heat_map),
        _save(_curves(cells, tasks, lengths), curves),
    ]


def _heat_map(cells: Rows, tasks: Sequence[str], lengths: Sequence[str]) -> Figure:
    grid = [[math.nan] * len(lengths) for _ in tasks]
    for cell in cells:
        grid[tasks.index(cell["task"])][lengths.index(cell["length"])] = 100 * cell["accuracy"]
    figure = _new_figure(2.4 + 0.75 * len(lengths), 1.6 + 0.42 * len(tasks))
    axis = figure.subplots()
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
    return figure


def _curves(cells: Rows, tasks: Sequence[str], lengths: Sequence[str]) -> Figure:
    figure = _new_figure(7.5, 4.5)
    axis = figure.subplots()
    for number, task in enumerate(tasks):
        own = [cell for cell in cells if cell["task"] == task]
        # slightly shifted, so that the intervals of different tasks do not cover each other
        x = [lengths.index(cell["length"]) + 0.3 * ((number + 0.5) / len(tasks) - 0.5) for cell in own]
        y = [100 * cell["accuracy"] for cell in own]
        spread = [[100 * (c["accuracy"] - c["low"]) for c in own], [100 * (c["high"] - c["accuracy"]) for c in own]]
        style = "o-" if number < 10 else "s--"
        axis.errorbar(x, y, yerr=spread, fmt=style, markersize=4, linewidth=1.2, elinewidth=0.7, capsize=2, label=task)
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set(xlabel="length, tokens", ylabel="accuracy, % (95% intervals)", ylim=(-2, 102), title="BABILong by length")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------


def draw_scores(result: Mapping[str, Any], output: AnyPath) -> list[AnyPath]:
    """One picture beside `output`, from the JSON of `harness.evaluate`: a panel per metric, a bar per task."""
    metrics = list(dict.fromkeys(row["metric"] for row in result["scores"]))
    panels = [[row for row in result["scores"] if row["metric"] == metric] for metric in metrics]
    heights = [len(own) + 1 for own in panels]
    figure = _new_figure(7.5, 0.6 + 0.3 * sum(heights))
    axes = figure.subplots(len(metrics), height_ratios=heights, squeeze=False)
    for metric, own, axis in zip(metrics, panels, axes[:, 0], strict=True):
        own = own[::-1]  # bars are drawn from below
        colors = ["tab:orange" if row["group"] else "tab:blue" for row in own]
        spread = [1.96 * (row["stderr"] or 0) for row in own]
        axis.barh([row["task"] for row in own], [row["value"] for row in own], xerr=spread, color=colors, capsize=2)
        axis.set(xlabel=f"{metric} (95% intervals)")
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{result['task']}, lm-evaluation-harness {result['harness']}")
    return [_save(figure, output.with_suffix(".png"))]
