"""Tables and pictures of tools/reproduce_babilong.py, from the JSON of its cells alone."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]

# Two-sided 95% quantiles of Student's t by degrees of freedom, for means over few seeds
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def write_report(output: Path) -> str:
    """Writes report.md and the pictures into `output`, from output/cells/*.json; returns the report's text."""
    results = [json.loads(path.read_text()) for path in sorted((output / "cells").glob("*.json"))]
    by_phase: dict[str, list[Result]] = {}
    for result in results:
        by_phase.setdefault(result["labels"]["phase"], []).append(result)
    parts = []
    if compared := by_phase.get("comparison"):
        parts.append(_comparison(compared, output / "comparison.png"))
        parts.append(_grid(compared, output / "settings.png"))
    if longer := by_phase.get("longer"):
        parts.append(_longer(longer))
    if tried := by_phase.get("tried"):
        parts.append(_tried(tried))
    if pilots := by_phase.get("pilot"):
        parts.append(_pilots(pilots, output / "pilots.png"))
    if second := by_phase.get("second stage"):
        parts.append(_second_stage(second))
    if ablations := by_phase.get("ablation"):
        title = "## Ablations of lm2 at equal parameters (qa1; exact match at multiples of the trained length)"
        parts.append(_ablations(title, ablations, output / "gates.png"))
    if first := by_phase.get("first round"):
        title = "## How the parts were chosen: an earlier lm2, with parts and switches that it has lost"
        parts.append(_ablations(title, first, output / "first_round.png"))
    text = "\n".join(parts) or "no cells yet\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    return text


def best_setting(results: Sequence[Result]) -> str:
    """The setting of a model's best result with the first seed, by what is compared: `_mean_to_8x` of the generator.

    The first of several as good. (Validation accuracy is of the windows trained on, which settings do not share.)
    """
    first = min(result["labels"]["seed"] for result in results)
    grid = [result for result in results if result["labels"]["seed"] == first]
    return max(grid, key=_accuracy)["labels"]["setting"]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t (nan for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    freedom = len(values) - 1
    return mean, _T95.get(freedom, 1.96) * statistics.stdev(values) / math.sqrt(len(values))


# --- The comparison ------------------------------------------------------------------------------------------------


def _comparison(compared: Sequence[Result], picture: Path) -> str:
    models = _in_order(compared, "model")
    best = {model: best_setting(_of(compared, model)) for model in models}
    results = [result for result in compared if result["labels"]["setting"] == best[result["labels"]["model"]]]
    accuracy = {model: _by_set_and_multiple(_of(results, model)) for model in models}
    sets = list(dict.fromkeys(name for cells in accuracy.values() for name, _ in cells))
    multiples = sorted({multiple for cells in accuracy.values() for _, multiple in cells})
    _plot_comparison(accuracy, sets, multiples, picture)

    lines = ["## Comparison", "", *_sizes(results, models), ""]
    header = [f"{multiple:g}x" if multiple else "facts only" for multiple in multiples]
    for name in sets:
        rows = [
            [model, *(_percent(accuracy[model].get((name, multiple))) for multiple in multiples)] for model in models
        ]
        lines += [
            f"**{name}**: exact match, mean and 95% interval over seeds",
            "",
            *_table(["model", *header], rows),
            "",
        ]
    first = min(result["labels"]["seed"] for result in results)
    others = [result for result in results if result["labels"]["seed"] > first]
    alike = [result for result in compared if result["labels"]["setting"] == best.get("lm2")]
    lines += _gains("Mean accuracy over 1, 2, 4 and 8 times the trained length", results, sets)
    if others:
        lines += _gains("The same without the seed by which settings were chosen", others, sets)
    if len(set(best.values())) > 1:
        lines += _gains(f"The same with every model in lm2's setting ({best.get('lm2')})", alike, sets)
    return "\n".join(lines)


def _gains(title: str, results: Sequence[Result], sets: Sequence[str]) -> list[str]:
    """How many times better lm2's mean accuracy from the trained length to 8 times it is, and by how many points."""
    accuracy = {model: _by_set_and_multiple(_of(results, model)) for model in _in_order(results, "model")}
    others = [model for model in ("rmt", "none", "full attention") if model in accuracy]
    if "lm2" not in accuracy or not others:
        return []
    sets = [name for name in sets if all((name, 1) in cells for cells in accuracy.values())]
    groups = {name: [name] for name in sets}
    groups["all of the generator"] = _of_generator(sets)
    if babi := [name for name in sets if name.endswith(_BABI)]:
        groups["all of bAbI's files"] = babi
    rows = []
    for group, names in groups.items():
        means = {model: _mean_to_8x(cells, names) for model, cells in accuracy.items()}
        rows.append([group, f"{means['lm2']:.1%}", *(_ratio(means["lm2"], means[other]) for other in others)])
    of_seeds = {model: _means_of_seeds(_of(results, model), _of_generator(sets)) for model in ("lm2", *others)}
    ahead = []
    for other in others:
        theirs = of_seeds[other]
        differences = [mean - theirs[seed] for seed, mean in of_seeds["lm2"].items() if seed in theirs]
        ahead.append(f"{_percent(differences).replace('%', '')} to {other}")
    return [
        f"**{title}**",
        "",
        *_table(["questions", "lm2", *(f"lm2 / {other}" for other in others)], rows),
        "",
        f"Points between them, seed by seed, over all of the generator: {', '.join(ahead)}.",
        "",
    ]


def _accuracy(result: Result) -> float:
    """What models and settings are judged by: `_mean_to_8x` of the generator's questions."""
    return _mean_to_8x(_by_set_and_multiple([result]), _of_generator(_sets(result)))


def _mean_to_8x(cells: Mapping[tuple[str, float], list[float]], names: Sequence[str]) -> float:
    """Mean accuracy on sets of questions over 1 to 8 times the trained length."""
    return statistics.fmean(
        statistics.fmean(values) for (name, multiple), values in cells.items() if name in names and 1 <= multiple <= 8
    )


def _means_of_seeds(results: Sequence[Result], names: Sequence[str]) -> dict[int, float]:
    """`_mean_to_8x` of a model's runs in one setting, by their seeds."""
    ordered = sorted(results, key=lambda result: result["labels"]["seed"])
    return {run["labels"]["seed"]: _mean_to_8x(_by_set_and_multiple([run]), names) for run in ordered}


def _by_set_and_multiple(results: Sequence[Result]) -> dict[tuple[str, float], list[float]]:
    """Accuracies over seeds by (set of questions, context as a multiple of the longest in training)."""
    found: dict[tuple[str, float], list[float]] = {}
    for result in results:
        for cell in result["accuracy_by_length"]:
            place = _set(cell["questions"]), cell["segments"] / result["trained_segments"]
            found.setdefault(place, []).append(cell["accuracy"])
    return found


_BABI = " (bAbI's file)"


def _set(questions: str) -> str:
    """qa1 for the generator's held-out stories, and another name for those of bAbI's qa1_..._test.txt."""
    return questions.removesuffix(" (generator)") if questions.endswith(")") else questions.split("_")[0] + _BABI


def _sets(result: Result) -> list[str]:
    return list(dict.fromkeys(_set(cell["questions"]) for cell in result["accuracy_by_length"]))


def _of_generator(sets: Sequence[str]) -> list[str]:
    return [name for name in sets if not name.endswith(_BABI)]


def _plot_comparison(
    accuracy: Mapping[str, Mapping[tuple[str, float], list[float]]],
    sets: Sequence[str],
    multiples: Sequence[float],
    path: Path,
) -> None:
    plt = _pyplot()
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


# --- The grid ------------------------------------------------------------------------------------------------------


def _grid(results: Sequence[Result], picture: Path) -> str:
    _plot_settings(results, picture)
    selected = {model: best_setting(_of(results, model)) for model in _in_order(results, "model")}
    lines = [
        "## Every setting: exact match in per cent",
        "",
        "By set of questions the mean over 1 to 8 times the trained length, by length the mean over the generator's,",
        "then the mean of all that with its 95% interval over seeds, and that of every seed. The setting that is",
        "best with the first seed is selected.",
        "",
        *_by_setting(results, selected),
    ]
    return "\n".join([*lines, ""])


def _by_setting(results: Sequence[Result], selected: Mapping[str, str]) -> list[str]:
    """A table of models and settings; the selected ones are marked."""
    sets = _sets(results[0])
    asked = _of_generator(sets)
    multiples = [m for m in sorted({m for _, m in _by_set_and_multiple(results)}) if 1 <= m <= 8]
    rows = []
    for model in _in_order(results, "model"):
        own = _of(results, model)
        for setting in sorted({result["labels"]["setting"] for result in own}):
            runs = [result for result in own if result["labels"]["setting"] == setting]
            cells = _by_set_and_multiple(runs)
            by_set = [_mean_to_8x(cells, [name]) for name in sets]
            by_length = [statistics.fmean(statistics.fmean(cells[name, m]) for name in asked) for m in multiples]
            of_seeds = [*_means_of_seeds(runs, asked).values()]
            means = (f"{100 * mean:.1f}" for mean in (*by_set, *by_length))
            each = " ".join(f"{100 * mean:.1f}" for mean in of_seeds)
            name = setting + " (selected)" * (setting == selected.get(model))
            rows.append([model, name, *means, _percent(of_seeds).replace("%", ""), each])
    lengths = [f"{multiple:g}x" for multiple in multiples]
    return _table(["model", "setting", *sets, *lengths, "mean", "seeds"], rows)


def _longer(longer: Sequence[Result]) -> str:
    lines = ["## Selected, trained twice as long: exact match in per cent", "", *_by_setting(longer, {}), ""]
    title = "Mean accuracy, every model trained twice as long, over the seeds there are"
    return "\n".join([*lines, *_gains(title, longer, _sets(longer[0]))])


def _plot_settings(results: Sequence[Result], path: Path) -> None:
    """Every model in every setting, its own solid: mean over the generator's questions and the seeds there are."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.2))
    settings = sorted({result["labels"]["setting"] for result in results})
    for number, model in enumerate(_in_order(results, "model")):
        best = best_setting(_of(results, model))
        for setting, marker in zip(settings, itertools.cycle("os^Dv"), strict=False):
            own = [result for result in _of(results, model) if result["labels"]["setting"] == setting]
            if not own:
                continue
            cells, sets = _by_set_and_multiple(own), _of_generator(_sets(own[0]))
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


# --- What was tried before ------------------------------------------------------------------------------------------


def _tried(results: Sequence[Result]) -> str:
    """Whole runs of earlier recipes."""
    rows, sets = [], _sets(results[0])
    for result in results:
        cells = _by_set_and_multiple([result])
        names = [str(result["labels"][key]) for key in ("model", "setting", "seed")]
        sizes = [f"{result[key]:,}" for key in ("parameters", "memory_size", "tokens")]
        rows.append([*names, *sizes, *(f"{_mean_to_8x(cells, [s]):.1%}" for s in sets)])
    table = _table(["model", "recipe", "seed", "parameters", "memory", "tokens", *sets], rows)
    return "\n".join(["## Recipes of before: mean over 1, 2, 4 and 8 times the trained length", "", *table, ""])


def _pilots(results: Sequence[Result], picture: Path) -> str:
    """How fast one segment is learnt: the curves of runs that were stopped early, or went on to more segments."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(10, 4.6))
    rows = []
    for number, result in enumerate(results):
        curves, model, data = result["curves"], result["config"]["model"], result["config"]["data"]
        places = _last_stage(curves)
        tokens = [curves["tokens"][i] / 1e6 for i in places]
        accuracy = [curves["accuracy"][i] for i in places]
        name = result["labels"]["model"]
        axis.plot(tokens, accuracy, label=name, color=plt.cm.tab20(number % 20))
        learnt = next((t for t, a in zip(tokens, accuracy, strict=True) if a >= 0.9), None)
        steps = f"at {learnt:.1f} M" if learnt else f"not in {tokens[-1]:.1f} M"
        rows.append([name, str(model["d_ff"]), str(data["batch_size"]), f"{accuracy[-1]:.0%}", steps])
    axis.set(xlabel="tokens, millions", ylabel="answers right in training, one segment of 64 tokens", ylim=(0.4, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    table = _table(["model", "d_ff", "lanes", "at the end", "90% right"], rows)
    title = "## What it takes to learn one segment (qa1 to qa3; answers right in training, means of 25 steps)"
    return "\n".join([title, "", *table, ""])


def _second_stage(results: Sequence[Result]) -> str:
    """How lm2 learns to use its memory: windows of two segments, from the weights of a run that knows one."""
    rows = []
    for result in results:
        labels, curves = result["labels"], result["curves"]
        places = _last_stage(curves)
        start = curves["step"][places[0]] - 25
        steps = [f"{curves['accuracy'][i]:.0%} at {curves['step'][i] - start}" for i in (*places[5::6], places[-1])]
        rows.append([labels["weights"], labels["model"], str(labels["seed"]), ", ".join(dict.fromkeys(steps))])
    table = _table(["weights at first", "change", "seed of the data", "answers right in training, at step"], rows)
    title = "## What it takes to use the memory (lm2, two segments of 32 tokens; means of 25 steps)"
    return "\n".join([title, "", *table, ""])


# --- Ablations -----------------------------------------------------------------------------------------------------


def _ablations(title: str, results: Sequence[Result], picture: Path) -> str:
    variants = _in_order(results, "model")
    multiples = sorted({m for _, m in _by_set_and_multiple(_of(results, variants[0]))})
    rows = []
    for variant in variants:
        own = _of(results, variant)
        cells = _by_set_and_multiple(own)
        sets = list(dict.fromkeys(name for name, _ in cells))
        found = [_percent(cells.get((sets[0], multiple))) for multiple in multiples]
        learnt = [step for result in own if (step := _step_learnt(result)) is not None]
        steps = f"{statistics.fmean(learnt):.0f}" if len(learnt) == len(own) else f"{len(learnt)} of {len(own)} did"
        rows.append([variant, str(len(own)), f"{own[0]['parameters']:,}", steps, *found])
    _plot_gates(results, picture)
    header = ["lm2", "seeds", "parameters", "step at 95%", *(f"{multiple:g}x" for multiple in multiples)]
    return "\n".join([title, "", *_table(header, rows), ""])


def _step_learnt(result: Result) -> int | None:
    """The first step around which 95% of the answers in training were right in the last stage."""
    curves = result["curves"]
    stage = max(curves["stage"])
    steps = [
        step
        for step, where, accuracy in zip(curves["step"], curves["stage"], curves["accuracy"], strict=True)
        if where == stage and accuracy is not None and accuracy >= 0.95
    ]
    return round(min(steps)) if steps else None


def _plot_gates(results: Sequence[Result], path: Path) -> None:
    """Training accuracy and mean gates by step, of the first seed of every variant."""
    plt = _pyplot()
    variants = _in_order(results, "model")
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6))
    for number, variant in enumerate(variants):
        curves = _of(results, variant)[0]["curves"]
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


# --- Small parts ---------------------------------------------------------------------------------------------------


def _in_order(results: Sequence[Result], label: str) -> list[str]:
    first = {"lm2": 0, "as it is": 0, "rmt": 1, "none": 2}
    names = dict.fromkeys(result["labels"][label] for result in results)
    return sorted(names, key=lambda name: first.get(name, 3))


def _of(results: Sequence[Result], model: str) -> list[Result]:
    return [result for result in results if result["labels"]["model"] == model]


def _sizes(results: Sequence[Result], models: Sequence[str]) -> list[str]:
    rows = []
    for model in models:
        own = _of(results, model)
        seconds = statistics.fmean(result["seconds"] for result in own)
        sizes = [f"{own[0][key]:,}" for key in ("parameters", "memory_size", "tokens")]
        rows.append([model, *sizes, own[0]["labels"]["setting"], str(len(own)), f"{seconds / 60:.0f} min"])
    return _table(["model", "parameters", "memory", "tokens", "setting", "seeds", "time"], rows)


def _last_stage(curves: Mapping[str, Sequence[float]]) -> list[int]:
    """Places of a run's curves that belong to its last stage."""
    last = max(curves["stage"])
    return [place for place, stage in enumerate(curves["stage"]) if stage == last]


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else "no other is right"


def _percent(values: Sequence[float] | None) -> str:
    """The mean with its 95% interval, or one or two values as they are, which tell of no interval worth the name."""
    if not values or len(values) < 3:
        return " / ".join(f"{value:.1%}" for value in values or ())
    mean, half = mean_and_interval(values)
    return f"{mean:.1%} ± {half:.1%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _pyplot() -> Any:
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
