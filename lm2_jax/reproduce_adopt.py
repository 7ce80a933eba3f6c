"""Gives a pretrained Llama a memory, and measures what it is worth: facts in long contexts, and novels.

The study of docs/adopt.md. Every cell is trained in processes of its own and kept in OUTPUT/cells as JSON, so a study
that is interrupted goes on where it was. Tables and pictures are drawn from those files alone (--report).
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import time

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.storage import to_local_path


def main() -> None:
    """The command."""
    parser = parser_for(
        "reproduce_adopt",
        __doc__,
        "--part books --start adopt/smollm2 --texts 'train/*.txt' --held-out novel.txt --output runs/adopt",
        "--part facts --start adopt/smollm2 --texts 'train/*.txt' --output runs/adopt --hours 2",
    )
    parser.add_argument(
        "--output", type=to_local_path, required=True, metavar="DIR", help="cells, tables and pictures go here"
    )
    parser.add_argument("--part", choices=("facts", "books"), default="books")
    parser.add_argument(
        "--start", type=to_local_path, metavar="DIR", help="SmolLM2-135M-Instruct, converted to lm2_jax"
    )
    files = {"type": to_local_path, "default": [], "metavar": "FILE"}
    parser.add_argument("--texts", nargs="+", **files, help="novels; facts stand among them")
    parser.add_argument("--held-out", nargs="+", **files, help="books: novels to measure on")
    parser.add_argument("--questions", nargs="*", **files, help="facts: bAbI files to ask, too")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="of every cell")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells to train, such as '*-0'")
    parser.add_argument("--hours", type=float, default=1e9, metavar="H", help="begin no cell after so many hours")
    parser.add_argument("--report", action="store_true", help="train nothing; draw tables and pictures again")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments)
    from lm2_jax.study.adopt_report import write_report  # imported late so that --help stays fast

    print(write_report(arguments.output))


def run(arguments: argparse.Namespace) -> None:
    """Trains and measures the cells that are missing. Raises UserError where a file that they need is not given."""
    from lm2_jax.study.adopt import cells
    from lm2_jax.study.adopt_runner import run_base, run_cell

    needed = {"--start": arguments.start, "--texts": arguments.texts}
    if arguments.part == "books":
        needed["--held-out"] = arguments.held_out
    missing = [option for option, value in needed.items() if not value]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; the cells of part {arguments.part} read them")
    if arguments.seeds < 1:
        raise UserError(f"--seeds: found {arguments.seeds}; expected 1 or more")
    start, output = arguments.start.resolve(), arguments.output.resolve()
    texts, held_out, questions = (
        [str(path.resolve()) for path in paths] for paths in (arguments.texts, arguments.held_out, arguments.questions)
    )
    planned = cells(arguments.part, start, texts, questions, arguments.seeds)
    until = time.monotonic() + arguments.hours * 3600
    if arguments.part == "books":
        run_base(start, planned[0], held_out, output)
    for cell in planned:
        if fnmatch.fnmatch(cell.name, arguments.only) and time.monotonic() < until:
            run_cell(cell, start, held_out, output)
            print(f"{cell.name}: done", flush=True)


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
