"""Measures a model: `python -m lm2_jax.evaluate --checkpoint runs/books --task perplexity --output books.json`.

Each task is a module of evals/ with three functions: `evaluate` returns JSON, `tables` and `draw` show it.
"""

from __future__ import annotations

import functools
from types import ModuleType

from lm2_jax.common.command_line import evaluate_arguments
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.jax_stack import check_jax_stack
from lm2_jax.common.storage import has_directory


def main() -> None:
    """The command."""
    arguments = evaluate_arguments()
    output = arguments.output
    if output is not None and (output.suffix != ".json" or not has_directory(output)):
        raise UserError(f"--output: found {output}; give a file that ends in .json, in a directory that exists")
    check_jax_stack()

    # imported late so that --help stays fast
    import json

    from rich.console import Console

    from lm2_jax.common.files import write_atomically
    from lm2_jax.evals.model import load_for_evaluation
    from lm2_jax.parallel.mesh import use_mesh

    task, console = import_task(arguments.task), Console(highlight=False, soft_wrap=True)
    loaded = load_for_evaluation(arguments.checkpoint, arguments.set)
    with use_mesh(loaded.mesh):
        result = task.evaluate(loaded, output, lambda text: console.print(text, markup=False))
    for table in task.tables(result):
        console.print(table)
    if output is not None:
        write_atomically(output, json.dumps(result, indent=1) + "\n")
        written = [output, *task.draw(result, output)]
        console.print(f"written: {', '.join(map(str, written))}", markup=False)


def import_task(name: str) -> ModuleType:
    """The module of one of `EVALUATION_TASKS`."""
    from lm2_jax.evals import babilong, harness, mmlu, perplexity  # imported late so that --help stays fast

    return {"perplexity": perplexity, "babilong": babilong, "mmlu": mmlu, "harness": harness}[name]


command = functools.partial(
    run_command, main, interrupted="interrupted; with --output, the same command resumes after what is finished"
)

if __name__ == "__main__":
    command()
