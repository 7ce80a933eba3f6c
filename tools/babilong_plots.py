"""Pictures of a study's results."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babilong_results import (
    Result,
    best_setting,
    by_set_and_multiple,
    in_order,
    mean_and_interval,
    of_generator,
    of_model,
    sets_of,
)


def plot_comparison(
    accuracy: Mapping[str, Mapping[tuple[str, float], list[float]]],
    sets: Sequence[str],
    multiples: Sequence[float],
    path: Path,
) -> None:
    """Accuracy by length of every model, a panel for each set of questions, with intervals over seeds."""
    plt = pyplot()
    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False, sharey=True)
    for axis, name in zip(axes.flat, sets, strict=False):
        for number, (model, cells) in enumerate(accuracy.items()):
            there = [multiple for multiple in multiples if (name, multiple) in cells]
            x = [multiples.index(multiple) + 0.06 * number for multiple in there]
            points = [mean_and_interval(cells[name, multiple]) for multiple in there]
            spread = [0 if math.isnan(half) else half for _, half in points]
            axis.errorbar(
                x, [mean for mean, _ in points], yerr=spread, marker="o", markersize=4, capsize=2, label=model
            )
        axis.set_xticks(range(len(multiples)), [f"{multiple:g}x" if multiple else "facts" for multiple in multiples])
        axis.set(title=name, ylim=(0, 1.02), xlabel="context, multiples of the first setting's windows")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(sets) :]:
        axis.set_axis_off()
    axes[0, 0].set_ylabel("accuracy (exact match)")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_settings(results: Sequence[Result], path: Path) -> None:
    """Every model in every setting, its own solid: mean over the generator's questions and the seeds there are."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.2))
    settings = sorted({result["labels"]["setting"] for result in results})
    for number, model in enumerate(in_order(results, "model")):
        best = best_setting(of_model(results, model))
        for setting, marker in zip(settings, itertools.cycle("os^Dv"), strict=False):
            own = [result for result in of_model(results, model) if result["labels"]["setting"] == setting]
            if not own:
                continue
            cells, sets = by_set_and_multiple(own), of_generator(sets_of(own[0]))
            multiples = sorted({multiple for _, multiple in cells if multiple})
            means = [statistics.fmean(statistics.fmean(cells[name, m]) for name in sets) for m in multiples]
            style = {"linewidth": 2.2} if setting == best else {"linewidth": 0.8, "linestyle": "--"}
            name = f"{model}: {setting}" + " (selected)" * (setting == best)
            axis.plot(multiples, means, color=f"C{number}", marker=marker, markersize=4, label=name, **style)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda multiple, _: f"{multiple:g}x")
    axis.set(ylim=(0, 1.02), ylabel="accuracy (exact match)")
    axis.set_xlabel("context, multiples of the first setting's windows")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_gates(results: Sequence[Result], path: Path) -> None:
    """Training accuracy and mean gates by step, of the first seed of every variant."""
    plt = pyplot()
    variants = in_order(results, "model")
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6))
    for number, variant in enumerate(variants):
        curves = of_model(results, variant)[0]["curves"]
        style = {"color": plt.cm.tab20(number % 20), "label": variant, "linewidth": 2.5 if number == 0 else 1}
        for axis, name in zip(axes, ("accuracy", "gate_forget", "gate_output"), strict=True):
            if name in curves:
                axis.plot(curves["step"], [math.nan if v is None else v for v in curves[name]], **style)
    for axis, title in zip(axes, ("answers right in training", "forget gate, mean", "output gate, mean"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot without a display."""
    import matplotlib  # imported late so that --help stays fast

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
