"""Looks into a model's memory while it reads: which slots tokens read, what segments write, how long facts survive.

OUTPUT gets PNGs and index.html, one file that opens anywhere. Without a text, a model trained on stories reads one of
its own (with a question at the end), and many more to see how long a fact survives.
"""

from __future__ import annotations

import functools

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import run_command
from lm2_jax.common.jax_stack import check_jax_stack
from lm2_jax.common.storage import to_path


def main() -> None:
    """The command."""
    parser = parser_for(
        "inspect_memory",
        __doc__,
        "--checkpoint runs/babilong_tiny --output memory",
        "--checkpoint runs/books --text book.txt --output memory",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a run directory, a checkpoint, or a converted one"
    )
    parser.add_argument("--output", required=True, type=to_path, metavar="DIR", help="made if it is not there")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to read; default: a story, if trained on stories")
    parser.add_argument("--segments", type=int, metavar="S", help="read so many; default: all, or 4 windows of a story")
    parser.add_argument("--tokens", type=int, default=48, metavar="K", help="last tokens to look at; default 48")
    parser.add_argument("--questions", type=int, default=512, metavar="B", help="stories to ask about; default 512")
    arguments = parser.parse_args()
    check_jax_stack()

    from lm2_jax.inspection.report import inspect  # imported late so that --help stays fast

    page, *pictures = inspect(**vars(arguments))
    print(f"written: {page}, and its {len(pictures)} pictures")


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
