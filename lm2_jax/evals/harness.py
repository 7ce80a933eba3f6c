"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), asked of a model of ours.

The harness is optional: `pip install lm-eval`. Its tasks fetch their data from the hub, unless task files of your own
name others.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lm2_jax.common.errors import UserError
from lm2_jax.config import HarnessConfig, MmluConfig
from lm2_jax.evals.model import EvalModel
from lm2_jax.evals.results import ResultLog, finished_path

Result = dict[str, Any]
_BOOTSTRAPS = 1000  # samples, for the standard errors of metrics that are no means
_FEWSHOT_SEED = 1234  # the harness's own


def evaluate(loaded: EvalModel, output: Path | None, log: Callable[[str], None]) -> Result:
    """Runs eval.harness.tasks. Finished requests are kept beside `output`, and are not asked again.

    Returns JSON: `scores`, a row for each task or group and each metric (task, metric, value, its standard error where
    there is one, shots, samples).
    Raises UserError for a task that is unknown or cannot be loaded, and without the harness.
    """
    ask = loaded.config.eval.harness
    if not ask.tasks:
        raise UserError(
            "eval.harness.tasks is missing: name tasks of lm-evaluation-harness, for example [arc_easy, lambada_openai]"
        )
    if ask.include is not None and not Path(ask.include).is_dir():
        raise UserError(f"eval.harness.include: {ask.include} is no directory; name one with task files (.yaml)")
    return run(loaded, output, log, ask, "harness", ask.tasks, ask.include)


def run(
    loaded: EvalModel,
    output: Path | None,
    log: Callable[[str], None],
    ask: HarnessConfig | MmluConfig,
    name: str,
    wanted: Sequence[Any],
    include: str | None = None,
) -> Result:
    """As `evaluate`, for `--task name` with the settings `ask`. wanted: names, or the harness's tasks and groups."""
    require()
    if loaded.config.has_tokenizer and loaded.config.tokenizer.kind == "stories":
        raise UserError(
            f"--task {name}: tokenizer.kind stories knows only the generator's words; evaluate a model with another "
            "tokenizer"
        )
    import lm_eval

    from lm2_jax.evals.harness_model import HarnessModel

    tasks = _load(name, wanted, include)
    for task in tasks["tasks"].values():
        _set_shots(task, ask.shots)
    finished = ResultLog(finished_path(output), _identity(loaded), key=("request",))
    model = HarnessModel(loaded, finished, log)
    found = lm_eval.evaluate(model, tasks, limit=ask.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
    return {
        "task": name,
        "checkpoint": loaded.checkpoint,
        "harness": importlib.metadata.version("lm_eval"),
        "settings": ask.model_dump(mode="json"),
        "scores": _scores(found),
    }


def require() -> None:
    """To be called before lm_eval is imported. Raises UserError if it is not installed.

    Keeps warnings of its own from standing between what `say` is told, and lets it fork no processes: in those, which
    it takes some standard errors in, JAX may hang.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks mmlu and harness need lm-evaluation-harness: pip install 'lm-eval>=0.4.13,<0.5'")
    os.environ["DISABLE_MULTIPROC"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _load(name: str, wanted: Sequence[Any], include: str | None) -> Any:
    """What `TaskManager.load` gives: tasks, groups, and which are in which."""
    from lm_eval.tasks import TaskManager

    names = [task for task in wanted if isinstance(task, str)]
    manager = TaskManager(include_path=include, include_defaults=bool(names))
    for task in names:
        if task not in manager.task_index and not Path(task).is_file():
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists those that it knows"
            raise UserError(f"eval.{name}: lm-evaluation-harness has no task {task!r}; {hint}")
    try:
        loaded = manager.load(list(wanted))
    except UserError:
        raise
    except Exception as error:  # task files are other people's programs, and fetch data
        raise UserError(f"eval.{name}: cannot load {', '.join(names)} ({type(error).__name__}: {error})") from error
    for key, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"eval.{name}: {key} runs the programs that the model writes; that is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"eval.{name}: {key} shows pictures, and the model reads text alone")
    return loaded


def _set_shots(task: Any, shots: int | None) -> None:
    """As `lm_eval.simple_evaluate` does: a task that says 0 is never given any; seeds are the harness's."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _identity(loaded: EvalModel) -> dict[str, Any]:
    """All that an answer depends on besides the request."""
    return {
        "evaluation": "harness",
        "parameters": loaded.fingerprint,
        "tokenizer": loaded.tokenizer.fingerprint(),
        "segment_length": loaded.config.trained_segment_length,
        "dtype": loaded.config.train.dtype,
    }


def _scores(found: dict[str, Any]) -> list[Result]:
    """The harness's figures as rows, groups first."""
    groups, scores = found.get("groups", {}), []
    for name, figures in {**groups, **found["results"]}.items():
        for key, value in figures.items():
            metric, _, kept = key.partition(",")  # "acc,none": the metric, and a filter of the answers
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{kept}")
            scores.append(
                {
                    "task": name,
                    "group": name in groups,
                    "metric": metric if kept == "none" else f"{metric} ({kept})",
                    "value": value,
                    "stderr": stderr if isinstance(stderr, int | float) else None,
                    "shots": found["n-shot"].get(name),
                    "samples": found["n-samples"].get(name, {}).get("effective", figures.get("sample_len")),
                }
            )
    return scores


# --- What it looks like --------------------------------------------------------------------------------------------


def tables(result: Result) -> list[Table]:
    """Every score with its standard error, for the terminal."""
    short_repr = Table(title=f"{result['task']} (lm-evaluation-harness {result['harness']})")
    short_repr.add_column("task")
    short_repr.add_column("metric")
    for column in ("value", "standard error", "shots", "samples"):
        short_repr.add_column(column, justify="right")
    for row in result["scores"]:
        optional = ("-" if row[name] is None else f"{row[name]:,}" for name in ("shots", "samples"))
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        short_repr.add_row(row["task"], row["metric"], f"{row['value']:.4f}", stderr, *optional)
    return [short_repr]


def draw(result: Result, output: Path) -> list[Path]:
    """A picture beside `output`: a panel for each metric, a bar for each task."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path, rows = output.with_suffix(".png"), result["scores"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    panels = [[row for row in rows if row["metric"] == metric] for metric in metrics]
    heights = [len(own) + 1 for own in panels]
    figure, axes = plt.subplots(
        len(metrics),
        figsize=(7.5, 0.6 + 0.3 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for metric, own, axis in zip(metrics, panels, axes[:, 0], strict=True):
        own = own[::-1]  # bars are drawn from below
        colors = ["tab:orange" if row["group"] else "tab:blue" for row in own]
        spread = [1.96 * (row["stderr"] or 0) for row in own]
        axis.barh([row["task"] for row in own], [row["value"] for row in own], xerr=spread, color=colors, capsize=2)
        axis.set(xlabel=f"{metric} (95% intervals)")
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{result['task']}, lm-evaluation-harness {result['harness']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]
