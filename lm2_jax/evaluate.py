"""Measures a model: `python -m lm2_jax.evaluate --checkpoint runs/books --task perplexity --output books.json`.

Each task is a module of evals/ with three functions: `evaluate` gives JSON, `tables` and `draw` show it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from lm2_jax.errors import UserError, run_command
from lm2_jax.evals import babilong, harness, mmlu, perplexity
from lm2_jax.evals.loaded import load_for_evaluation
from lm2_jax.files import write_atomically
from lm2_jax.sharding import use_mesh

TASKS = {"perplexity": perplexity, "babilong": babilong, "mmlu": mmlu, "harness": harness}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m lm2_jax.evaluate",
        description="Measure a model. With --output, finished work is kept, and the same command goes on from there.",
        epilog="examples: --task perplexity --set 'eval.perplexity.path=books/*.txt'; "
        "--task babilong --set eval.babilong.babi=en-10k --set 'eval.babilong.books=books/*.txt' "
        "--set 'eval.babilong.lengths=[0k, 1k, 128k]'; --task mmlu --set eval.mmlu.path=mmlu; "
        "--task harness --set 'eval.harness.tasks=[arc_easy, lambada_openai]' "
        "(all settings: PerplexityConfig, BabilongConfig, MmluConfig and HarnessConfig in config.py)",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run directory, one of its checkpoints, or a converted one",
    )
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result, and pictures beside it")
    arguments = parser.parse_args()
    output = arguments.output
    if output is not None and (output.suffix != ".json" or not output.absolute().parent.is_dir()):
        raise UserError(f"--output: found {output}; give a file that ends in .json, in a directory that exists")

    task, console = TASKS[arguments.task], Console(highlight=False, soft_wrap=True)
    loaded = load_for_evaluation(arguments.checkpoint, arguments.set)
    with use_mesh(loaded.mesh):
        result = task.evaluate(loaded, output, lambda text: console.print(text, markup=False))
    for table in task.tables(result):
        console.print(table)
    if output is not None:
        write_atomically(output, json.dumps(result, indent=1) + "\n")
        written = [output, *task.draw(result, output)]
        console.print(f"written: {', '.join(map(str, written))}", markup=False)


if __name__ == "__main__":
    run_command(main)
