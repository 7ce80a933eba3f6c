"""Tables and pictures of a study, from the JSON of its cells alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm2_jax.study.plots import plot_comparison, plot_gates, plot_pilots, plot_settings
from lm2_jax.study.results import (
    BABI,
    Result,
    best_setting,
    by_set_and_multiple,
    in_order,
    last_stage,
    mean_and_interval,
    mean_to_8x,
    means_of_seeds,
    of_generator,
    of_model,
    read_results,
    sets_of,
)


def write_report(output: Path) -> str:
    """Writes report.md and the pictures into `output`, from output/cells/*.json; returns the report's text."""
    by_phase: dict[str, list[Result]] = {}
    for result in read_results(output):
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
    text = "\n".join(parts)
    (output / "report.md").write_text(text, encoding="utf-8")
    return text


# --- The comparison ------------------------------------------------------------------------------------------------


def _comparison(compared: Sequence[Result], picture: Path) -> str:
    models = in_order(compared, "model")
    best = {model: best_setting(of_model(compared, model)) for model in models}
    results = [result for result in compared if result["labels"]["setting"] == best[result["labels"]["model"]]]
    accuracy = {model: by_set_and_multiple(of_model(results, model)) for model in models}
    sets = list(dict.fromkeys(name for cells in accuracy.values() for name, _ in cells))
    multiples = sorted({multiple for cells in accuracy.values() for _, multiple in cells})
    plot_comparison(accuracy, sets, multiples, picture)

    lines = ["## Comparison", "", *_sizes(results, models), ""]
    header = [f"{multiple:g}x" if multiple else "facts only" for multiple in multiples]
    for name in sets:
        rows = [
            [model, *(_percent(accuracy[model].get((name, multiple))) for multiple in multiples)] for model in models
        ]
        lines += [
            f"**{name}**: exact match, mean and 95% interval over seeds",
            "",
            *table(["model", *header], rows),
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
    """Ratio and difference of lm2's mean accuracy, over 1 to 8 times the trained length, to the other models'."""
    accuracy = {model: by_set_and_multiple(of_model(results, model)) for model in in_order(results, "model")}
    others = [model for model in ("rmt", "none", "full attention") if model in accuracy]
    if "lm2" not in accuracy or not others:
        return []
    sets = [name for name in sets if all((name, 1) in cells for cells in accuracy.values())]
    groups = {name: [name] for name in sets}
    groups["all of the generator"] = of_generator(sets)
    if babi := [name for name in sets if name.endswith(BABI)]:
        groups["all of bAbI's files"] = babi
    rows = []
    for group, names in groups.items():
        means = {model: mean_to_8x(cells, names) for model, cells in accuracy.items()}
        rows.append([group, f"{means['lm2']:.1%}", *(_ratio(means["lm2"], means[other]) for other in others)])
    of_seeds = {model: means_of_seeds(of_model(results, model), of_generator(sets)) for model in ("lm2", *others)}
    ahead = []
    for other in others:
        theirs = of_seeds[other]
        differences = [mean - theirs[seed] for seed, mean in of_seeds["lm2"].items() if seed in theirs]
        ahead.append(f"{_percent(differences).replace('%', '')} to {other}")
    return [
        f"**{title}**",
        "",
        *table(["questions", "lm2", *(f"lm2 / {other}" for other in others)], rows),
        "",
        f"Points between them, seed by seed, over all of the generator: {', '.join(ahead)}.",
        "",
    ]


# --- The grid ------------------------------------------------------------------------------------------------------


def _grid(results: Sequence[Result], picture: Path) -> str:
    plot_settings(results, picture)
    selected = {model: best_setting(of_model(results, model)) for model in in_order(results, "model")}
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
    sets = sets_of(results[0])
    asked = of_generator(sets)
    multiples = [m for m in sorted({m for _, m in by_set_and_multiple(results)}) if 1 <= m <= 8]
    rows = []
    for model in in_order(results, "model"):
        own = of_model(results, model)
        for setting in sorted({result["labels"]["setting"] for result in own}):
            runs = [result for result in own if result["labels"]["setting"] == setting]
            cells = by_set_and_multiple(runs)
            by_set = [mean_to_8x(cells, [name]) for name in sets]
            by_length = [statistics.fmean(statistics.fmean(cells[name, m]) for name in asked) for m in multiples]
            of_seeds = [*means_of_seeds(runs, asked).values()]
            means = (f"{100 * mean:.1f}" for mean in (*by_set, *by_length))
            each = " ".join(f"{100 * mean:.1f}" for mean in of_seeds)
            name = setting + " (selected)" * (setting == selected.get(model))
            rows.append([model, name, *means, _percent(of_seeds).replace("%", ""), each])
    lengths = [f"{multiple:g}x" for multiple in multiples]
    return table(["model", "setting", *sets, *lengths, "mean", "seeds"], rows)


def _longer(longer: Sequence[Result]) -> str:
    lines = ["## Selected, trained twice as long: exact match in per cent", "", *_by_setting(longer, {}), ""]
    title = "Mean accuracy, every model trained twice as long, over the seeds there are"
    return "\n".join([*lines, *_gains(title, longer, sets_of(longer[0]))])


# --- What was tried before ------------------------------------------------------------------------------------------


def _tried(results: Sequence[Result]) -> str:
    """Whole runs of earlier recipes."""
    rows, sets = [], sets_of(results[0])
    for result in results:
        cells = by_set_and_multiple([result])
        names = [str(result["labels"][key]) for key in ("model", "setting", "seed")]
        sizes = [f"{result[key]:,}" for key in ("parameters", "memory_size", "tokens")]
        rows.append([*names, *sizes, *(f"{mean_to_8x(cells, [s]):.1%}" for s in sets)])
    title = "## Recipes of before: mean over 1, 2, 4 and 8 times the trained length"
    header = ["model", "recipe", "seed", "parameters", "memory", "tokens", *sets]
    return "\n".join([title, "", *table(header, rows), ""])


def _pilots(results: Sequence[Result], picture: Path) -> str:
    """How fast one segment is learnt: curves of runs that were stopped early or continued with more segments."""
    rows, drawn = [], []
    for result in results:
        curves, model, data = result["curves"], result["config"]["model"], result["config"]["data"]
        indices = last_stage(curves)
        tokens = [curves["tokens"][i] / 1e6 for i in indices]
        accuracy = [curves["accuracy"][i] for i in indices]
        name = result["labels"]["model"]
        drawn.append((name, tokens, accuracy))
        learnt = next((t for t, a in zip(tokens, accuracy, strict=True) if a >= 0.9), None)
        steps = f"at {learnt:.1f} M" if learnt else f"not in {tokens[-1]:.1f} M"
        rows.append([name, str(model["d_ff"]), str(data["batch_size"]), f"{accuracy[-1]:.0%}", steps])
    plot_pilots(drawn, picture)
    title = "## What it takes to learn one segment (qa1 to qa3; answers right in training, means of 25 steps)"
    return "\n".join([title, "", *table(["model", "d_ff", "lanes", "at the end", "90% right"], rows), ""])


def _second_stage(results: Sequence[Result]) -> str:
    """How lm2 learns to use its memory: windows of two segments, from the weights of a run trained on one."""
    rows = []
    for result in results:
        labels, curves = result["labels"], result["curves"]
        indices = last_stage(curves)
        start = curves["step"][indices[0]] - 25
        steps = [f"{curves['accuracy'][i]:.0%} at {curves['step'][i] - start}" for i in (*indices[5::6], indices[-1])]
        rows.append([labels["weights"], labels["model"], str(labels["seed"]), ", ".join(dict.fromkeys(steps))])
    title = "## What it takes to use the memory (lm2, two segments of 32 tokens; means of 25 steps)"
    header = ["weights at first", "change", "seed of the data", "answers right in training, at step"]
    return "\n".join([title, "", *table(header, rows), ""])


# --- Ablations -----------------------------------------------------------------------------------------------------


def _ablations(title: str, results: Sequence[Result], picture: Path) -> str:
    variants = in_order(results, "model")
    multiples = sorted({m for _, m in by_set_and_multiple(of_model(results, variants[0]))})
    rows = []
    for variant in variants:
        own = of_model(results, variant)
        cells = by_set_and_multiple(own)
        sets = list(dict.fromkeys(name for name, _ in cells))
        found = [_percent(cells.get((sets[0], multiple))) for multiple in multiples]
        learnt = [step for result in own if (step := _step_learnt(result)) is not None]
        steps = f"{statistics.fmean(learnt):.0f}" if len(learnt) == len(own) else f"{len(learnt)} of {len(own)} did"
        rows.append([variant, str(len(own)), f"{own[0]['parameters']:,}", steps, *found])
    plot_gates(results, picture)
    header = ["lm2", "seeds", "parameters", "step at 95%", *(f"{multiple:g}x" for multiple in multiples)]
    return "\n".join([title, "", *table(header, rows), ""])


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


# --- Small parts ---------------------------------------------------------------------------------------------------


def _sizes(results: Sequence[Result], models: Sequence[str]) -> list[str]:
    rows = []
    for model in models:
        own = of_model(results, model)
        seconds = statistics.fmean(result["seconds"] for result in own)
        sizes = [f"{own[0][key]:,}" for key in ("parameters", "memory_size", "tokens")]
        rows.append([model, *sizes, own[0]["labels"]["setting"], str(len(own)), f"{seconds / 60:.0f} min"])
    return table(["model", "parameters", "memory", "tokens", "setting", "seeds", "time"], rows)


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else "no other is right"


def _percent(values: Sequence[float] | None) -> str:
    """The mean with its 95% interval; one or two values as they are, since they give no useful interval."""
    if not values or len(values) < 3:
        return " / ".join(f"{value:.1%}" for value in values or ())
    mean, half = mean_and_interval(values)
    return f"{mean:.1%} ± {half:.1%}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
