"""Draws what one or several runs did: loss, answers, accuracy by length, learning rate, throughput, memory, gates.

Runs may still be going on. A panel that no run has anything for is left out.
"""

from __future__ import annotations

import functools

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.storage import has_directory, to_path
from lm2_jax.plots.runs import AXES, PANELS, plot_runs, read_runs


def main() -> None:
    """The command."""
    parser = parser_for(
        "plot_run",
        __doc__,
        "runs/babilong_tiny --output run.png",
        "runs/babilong_tiny runs/rmt runs/none --output runs.png --x tokens",
        "runs/babilong_tiny runs/rmt runs/none --output length.png --panels length",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--output", required=True, type=to_path, metavar="FILE.png")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS), help="default: all")
    parser.add_argument("--x", choices=AXES, default="step", help="the horizontal axis; default step")
    arguments = parser.parse_args()
    if not has_directory(arguments.output):
        raise UserError(f"--output: {arguments.output.parent} is no directory")
    plot_runs(arguments.output, read_runs(arguments.runs), arguments.panels, arguments.x)
    print(f"written: {arguments.output}")


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
