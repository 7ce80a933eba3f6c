"""MMLU (arXiv 2009.03300): multiple-choice questions on many subjects, asked by lm-evaluation-harness.

Questions are read from csv files, so nothing is downloaded. Prompts and scores are those of the harness's own task: the
model's choice is the letter with the highest probability after "Answer:".
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.local_copies import directory_of
from lm2_jax.common.storage import AnyPath
from lm2_jax.config import MmluConfig
from lm2_jax.evals.harness import Result, draw, require_harness, run, tables
from lm2_jax.evals.model import EvalModel

__all__ = ["draw", "evaluate", "read_questions", "tables"]

Question = dict[str, Any]
_LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
_TEST = "_test.csv"


def evaluate(loaded: EvalModel, output: AnyPath | None, log: Callable[[str], None]) -> Result:
    """Asks the questions of eval.mmlu, each after `shots` solved ones of its subject.

    The result has the form of `harness.evaluate`; the group mmlu is the mean over all questions.
    Raises UserError for files that are missing or damaged, and if the harness is not installed.
    """
    settings = loaded.config.eval.mmlu
    require_harness()
    if settings.path is None:
        wanted = [f"mmlu_{subject}" for subject in settings.subjects] if settings.subjects else ["mmlu"]
    else:
        wanted = [_group(directory_of(settings.path, "eval.mmlu.path"), settings)]
    return run(loaded, output, log, settings, "mmlu", wanted)


def read_questions(path: Path) -> list[Question]:
    """Reads questions from a csv file with the columns question, choice0 to choice3, answer (0 to 3).

    Returns dicts of question, choices and answer, as in the data set cais/mmlu. Raises UserError, with the file and the
    line, for a file that cannot be read, lacks a column or has a row that is not a question.
    """
    questions = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path}: column {missing[0]!r} is missing; the first line should be {','.join(_COLUMNS)}"
                )
            for row in rows:
                where = f"{path}: line {rows.line_num}: "
                if None in row or None in row.values():
                    raise UserError(where + f"should have as many fields as the first line, {len(rows.fieldnames)}")
                if row["answer"].strip() not in ("0", "1", "2", "3"):
                    raise UserError(where + f"answer: found {row['answer']!r}; should be 0, 1, 2 or 3")
                choices = [row[f"choice{number}"] for number in range(len(_LETTERS))]
                questions.append({"question": row["question"], "choices": choices, "answer": int(row["answer"])})
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not a UTF-8 csv file ({error})") from None
    if not questions:
        raise UserError(f"{path}: contains no questions")
    return questions


def _group(directory: Path, settings: MmluConfig) -> Any:
    """The harness's group of all subjects."""
    from lm_eval.api.group import Group, GroupConfig
    from lm_eval.api.task import ConfigurableTask

    files = sorted((directory / "test").glob(f"*{_TEST}"))
    subjects = settings.subjects or [path.name.removesuffix(_TEST) for path in files]
    if not subjects:
        raise UserError(f"eval.mmlu.path: {directory} holds no test/*{_TEST}; name a directory with dev/ and test/")
    mean = {"metric": "acc", "weight_by_size": True}
    group = Group.from_config(GroupConfig(group="mmlu", aggregate_metric_list=[mean]))
    for subject in subjects:
        group.add(ConfigurableTask(config=_task(directory, subject, settings.shots)))
    return group


def _task(directory: Path, subject: str, shots: int) -> dict[str, Any]:
    """The harness's definition of a subject: that of its tasks/mmlu/default, but with questions from `directory`."""
    path = directory / "dev" / f"{subject}_dev.csv"
    splits = {"test": read_questions(directory / "test" / f"{subject}{_TEST}")}
    if shots:
        splits["dev"] = read_questions(path)
        if len(splits["dev"]) < shots:
            raise UserError(f"eval.mmlu.shots: found {shots}, but {path} holds {len(splits['dev'])} solved questions")

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset  # comes with the harness

        return {name: Dataset.from_list(questions) for name, questions in splits.items()}

    choices = "".join(f"\n{letter}. {{{{choices[{number}]}}}}" for number, letter in enumerate(_LETTERS))
    return {
        "task": subject,
        "task_alias": subject,
        "custom_dataset": dataset,
        "test_split": "test",
        "fewshot_split": "dev" if shots else None,
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n",
        "doc_to_text": "{{question.strip()}}" + choices + "\nAnswer:",
        "doc_to_choice": list(_LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
