"""Pictures of a study's results."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, no display is needed

from lm2_jax.study.results import (
    Result,
    best_setting,
    by_set_and_multiple,
    in_order,
    mean_and_interval,
    of_generator,
    of_model,
    sets_of,
)

_AT_THE_RIGHT: dict[str, Any] = {"fontsize": 7, "loc": "center left", "bbox_to_anchor": (1, 0.5)}  # a legend


def plot_comparison(
    accuracy: Mapping[str, Mapping[tuple[str, float], list[float]]],
    sets: Sequence[str],
    multiples: Sequence[float],
    path: Path,
) -> None:
    """Accuracy by length of every model, a panel for each set of questions, with intervals over seeds."""
    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    figure = Figure((4.6 * columns, 3.6 * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
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
    for axis in list(axes.flat)[len(sets) :]:
        axis.set_axis_off()
    axes[0, 0].set_ylabel("accuracy (exact match)")
    axes[0, 0].legend(fontsize=8)
    _save(figure, axes.flat[: len(sets)], path, dpi=120)


def plot_settings(results: Sequence[Result], path: Path) -> None:
    """Every model in every setting, its own solid: mean over the generator's questions and the seeds there are."""
    figure = Figure((8, 4.2))
    axis = figure.subplots()
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
    axis.legend(**_AT_THE_RIGHT)
    _save(figure, [axis], path)


def plot_gates(results: Sequence[Result], path: Path) -> None:
    """Training accuracy and mean gates by step, of the first seed of every variant."""
    variants = in_order(results, "model")
    figure = Figure((15, 4.6))
    axes = figure.subplots(1, 3)
    for number, variant in enumerate(variants):
        curves = of_model(results, variant)[0]["curves"]
        style = {"color": colormaps["tab20"](number % 20), "label": variant, "linewidth": 2.5 if number == 0 else 1}
        for axis, name in zip(axes, ("accuracy", "gate_forget", "gate_output"), strict=True):
            if name in curves:
                axis.plot(curves["step"], [math.nan if v is None else v for v in curves[name]], **style)
    for axis, title in zip(axes, ("answers right in training", "forget gate, mean", "output gate, mean"), strict=True):
        axis.set(title=title, xlabel="step")
    axes[2].legend(**_AT_THE_RIGHT)
    _save(figure, axes, path)


def plot_pilots(pilots: Sequence[tuple[str, Sequence[float], Sequence[float]]], path: Path) -> None:
    """Training accuracy by millions of tokens of every pilot: its name, tokens and accuracies."""
    figure = Figure((10, 4.6))
    axis = figure.subplots()
    for number, (name, tokens, accuracy) in enumerate(pilots):
        axis.plot(tokens, accuracy, label=name, color=colormaps["tab20"](number % 20))
    axis.set(xlabel="tokens, millions", ylabel="answers right in training, one segment of 64 tokens", ylim=(0.4, 1))
    axis.legend(**_AT_THE_RIGHT)
    _save(figure, [axis], path)


def _save(figure: Any, axes: Iterable[Any], path: Path, dpi: int = 110) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
