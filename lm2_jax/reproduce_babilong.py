"""Trains lm2, rmt, none and full attention alike, and compares them on bAbI facts in long contexts.

Every cell (a model, a setting, a seed) is one run of `lm2_jax.train` on all tasks at once, in a process of its own; its
result is kept in OUTPUT/cells as JSON, so an interrupted study resumes. Tables and pictures are drawn from those files
alone (--report redraws them, without training). Models have equal parameters: the width of the feed-forward layers
compensates for what a memory costs. lm2 and rmt have memories of equal size.
"""

from __future__ import annotations

import argparse
import functools
import time

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.storage import to_local_path
from lm2_jax.study.cells import OPTIONS, Plan
from lm2_jax.study.presets import PRESETS, Preset
from lm2_jax.study.runner import CellRunner


def main() -> None:
    """The command."""
    parser = parser_for("reproduce_babilong", __doc__, "--output runs/study --preset smoke")
    parser.add_argument(
        "--output", type=to_local_path, required=True, metavar="DIR", help="cells, tables and pictures go here"
    )
    parser.add_argument("--preset", choices=PRESETS, default="smoke", help="the size of the study")
    parser.add_argument(
        "--babi", type=to_local_path, metavar="DIR", help="bAbI v1.2 files (en-10k); without: the generator"
    )
    parser.add_argument(
        "--background", type=to_local_path, metavar="FILE", help="preset full: text to scatter facts in"
    )
    parser.add_argument(
        "--tokenizer", type=to_local_path, metavar="FILE", help="preset full: Llama 3's tokenizer.model"
    )
    parser.add_argument(
        "--start", type=to_local_path, metavar="DIR", help="start from the weights DIR/lm2, DIR/rmt, DIR/none"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="cells at a time; they share the cores")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells to train, such as 'ablation-*'")
    parser.add_argument("--hours", type=float, default=1e9, metavar="H", help="begin no cell after so many hours")
    parser.add_argument("--report", action="store_true", help="train nothing; draw tables and pictures again")
    parser.add_argument("--write-configs", action="store_true", help="train nothing; write the configs of the grid")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    arguments.output = arguments.output.resolve()
    if not arguments.report:
        run(preset, arguments)
    if not arguments.write_configs:
        from lm2_jax.study.report import write_report  # imported late so that --help stays fast

        print(write_report(arguments.output))


def run(preset: Preset, arguments: argparse.Namespace) -> None:
    """Trains what is missing: the comparison's grid, its other seeds, longer runs, and the ablations."""
    files = {name: path.resolve() for name in OPTIONS if (path := getattr(arguments, name))}
    if "babi" in files and not files["babi"].is_dir():
        raise UserError(f"--babi: {files['babi']} is not a directory; give the one with qa1_..._test.txt")
    plan = Plan(preset, files)
    until = time.monotonic() + arguments.hours * 3600
    runner = CellRunner(arguments.output, files, arguments.workers, arguments.only, until)
    if arguments.write_configs:
        for cell in plan.grid():
            print(runner.write_config(cell))
        return
    grid = runner.results(plan.grid())
    runner.results(plan.comparison(grid))
    runner.results(plan.longer(grid))
    runner.results(plan.ablations())


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
