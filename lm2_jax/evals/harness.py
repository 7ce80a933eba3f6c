"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), run on a model of ours.

The harness is optional: `pip install lm-eval`. Its tasks download their data from the Hugging Face hub, unless your own
task files name other data.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
from rich.table import Table

from lm2_jax.common.errors import UserError
from lm2_jax.common.local_copies import directory_of
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import HarnessConfig, MmluConfig
from lm2_jax.convert.tokenizer_files import write_tokenizer
from lm2_jax.evals import plots
from lm2_jax.evals.model import EvalModel
from lm2_jax.evals.results import ResultLog, finished_path
from lm2_jax.evals.ruler import refuse_endless

Result = dict[str, Any]
_BOOTSTRAPS = 1000  # samples for the standard errors of metrics that are not means
_SEED, _NUMPY_SEED, _FEWSHOT_SEED = 0, 1234, 1234  # the harness's own


def evaluate(loaded: EvalModel, output: AnyPath | None, log: Callable[[str], None]) -> Result:
    """Runs eval.harness.tasks. Finished requests are kept beside `output`, and are not repeated.

    Returns JSON: `scores`, a row for each task or group and each metric (task, metric, value, its standard error where
    there is one, shots, samples).
    Raises UserError for a task that is unknown or cannot be loaded, and if the harness is not installed.
    """
    settings = loaded.config.eval.harness
    if not settings.tasks:
        raise UserError(
            "eval.harness.tasks is missing: name tasks of lm-evaluation-harness, for example [arc_easy, lambada_openai]"
        )
    include = None if settings.include is None else directory_of(settings.include, "eval.harness.include")
    if include is not None and not include.is_dir():
        raise UserError(f"eval.harness.include: {settings.include} is no directory; name one with task files (.yaml)")
    with _metadata(loaded, settings.metadata) as metadata:
        options = {"include_path": include and str(include), "metadata": metadata}
        return run(loaded, output, log, settings, "harness", settings.tasks, options)


def run(
    loaded: EvalModel,
    output: AnyPath | None,
    log: Callable[[str], None],
    settings: HarnessConfig | MmluConfig,
    name: str,
    wanted: Sequence[Any],
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Runs the tasks `wanted` for `--task name` with its settings; returns what `evaluate` does.

    wanted: names, or the harness's own task and group objects. options: of its `TaskManager`.
    """
    require_harness()
    if loaded.config.has_tokenizer and loaded.config.tokenizer.kind == "stories":
        raise UserError(
            f"--task {name}: tokenizer.kind stories knows only the generator's words; evaluate a model with another "
            "tokenizer"
        )
    import lm_eval

    from lm2_jax.evals.harness_model import HarnessModel

    tasks = _load(name, wanted, options)
    for task in tasks["tasks"].values():
        _set_shots(task, settings.shots)
    results = ResultLog(finished_path(output), _identity(loaded, settings.chat), key=("request",))
    model = HarnessModel(loaded, results, log, settings.chat)
    asked = {"limit": settings.limit, "apply_chat_template": settings.chat, "fewshot_as_multiturn": settings.chat}
    try:
        found = lm_eval.evaluate(model, tasks, bootstrap_iters=_BOOTSTRAPS, log_samples=False, **asked)
    except UserError:
        raise
    except Exception as error:  # of the harness and of task files, but not of the model
        if any(frame.f_globals["__name__"] == HarnessModel.__module__ for frame, _ in walk_tb(error.__traceback__)):
            raise
        raise UserError(
            f"eval.{name}: lm-evaluation-harness cannot run {', '.join(tasks['tasks'])} "
            f"({type(error).__name__}: {error}); change eval.{name}"
        ) from error
    return {
        "task": name,
        "checkpoint": loaded.checkpoint,
        "harness": importlib.metadata.version("lm_eval"),
        "settings": settings.model_dump(mode="json"),
        "scores": _scores(found),
    }


def require_harness() -> None:
    """Prepares for the import of lm_eval. Raises UserError if it is not installed.

    Silences lm_eval's logger, which would interleave with the progress lines, and sets DISABLE_MULTIPROC: lm_eval forks
    workers to bootstrap standard errors, and a forked JAX can deadlock.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks mmlu and harness need lm-evaluation-harness: pip install 'lm-eval>=0.4.13,<0.5'")
    os.environ["DISABLE_MULTIPROC"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@contextlib.contextmanager
def _metadata(loaded: EvalModel, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Metadata of tasks. Where none is given, the tokenizer by which RULER's measure their texts is the model's."""
    with tempfile.TemporaryDirectory() as directory:
        if not given.keys() & {"tokenizer", "pretrained", "model"}:
            write_tokenizer(loaded.config, loaded.origin, Path(directory))
            given = {"tokenizer": directory, **given}
        yield dict(given)


def _load(name: str, wanted: Sequence[Any], options: Mapping[str, Any] | None) -> Any:
    """Loads tasks and groups, as `TaskManager.load` returns them."""
    from lm_eval.tasks import TaskManager

    options = options or {}
    names = [task for task in wanted if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(names), **options)
    for task in names:
        if task not in manager.task_index and not Path(task).is_file():
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists those that it knows"
            raise UserError(f"eval.{name}: lm-evaluation-harness has no task {task!r}; {hint}")
    try:
        refuse_endless(names, options.get("metadata", {}))
        random.seed(_SEED)  # some tasks draw their questions; the seeds are the harness's own
        np.random.seed(_NUMPY_SEED)
        loaded = manager.load(list(wanted))
    except UserError:
        raise
    except Exception as error:  # task files are other people's programs, and download data
        raise UserError(f"eval.{name}: cannot load {', '.join(names)} ({type(error).__name__}: {error})") from error
    for key, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"eval.{name}: {key} runs programs that the model generates, which is not supported")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"eval.{name}: {key} contains pictures, but the model reads only text")
    return loaded


def _set_shots(task: Any, shots: int | None) -> None:
    """Sets the number of shots and their seed like `lm_eval.simple_evaluate`; a task that says 0 never gets any."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _identity(loaded: EvalModel, chat: bool) -> dict[str, Any]:
    """Everything that an answer depends on, besides the request."""
    special = loaded.tokenizer.special
    several_ends = special.stop_ids if special.stop_ids != (special.eos_id,) else ()
    return {
        "evaluation": "harness",
        "parameters": loaded.fingerprint,
        "tokenizer": loaded.tokenizer.fingerprint(),
        **({"stop_ids": several_ends} if several_ends else {}),
        **({"chat": True} if chat else {}),
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
            if metric.isdigit() and value == -1:  # RULER's word for a length without samples
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


# --- Tables and pictures -------------------------------------------------------------------------------------------


def tables(result: Result) -> list[Table]:
    """Every score with its standard error, for the terminal."""
    table = Table(title=f"{result['task']} (lm-evaluation-harness {result['harness']})")
    table.add_column("task")
    table.add_column("metric")
    for column in ("value", "standard error", "shots", "samples"):
        table.add_column(column, justify="right")
    for row in result["scores"]:
        optional = ("-" if row[name] is None else f"{row[name]:,}" for name in ("shots", "samples"))
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        table.add_row(row["task"], row["metric"], f"{row['value']:.4f}", stderr, *optional)
    return [table]


def draw(result: Result, output: AnyPath) -> list[AnyPath]:
    """Draws a panel for each metric with a bar for each task; returns the picture's path, beside `output`."""
    return plots.draw_scores(result, output)
