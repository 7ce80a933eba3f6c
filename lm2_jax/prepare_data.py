"""Makes token shards from text, JSON lines, parquet, hub data sets and official shards; or inspects shards.

Then set data.source to prepared and data.path to the output. Called again, it resumes where it stopped. The output is
the same for any number of workers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.storage import to_path
from lm2_jax.config import pattern_problem
from lm2_jax.data.prepare.inputs import open_inputs
from lm2_jax.data.prepare.inspection import describe, inspect
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import Settings, Tally, run_locally
from lm2_jax.tokenizer import find_tokenizer


def main() -> None:
    """Runs the command."""
    parser = parser_for(
        "prepare_data",
        __doc__,
        "--input 'books/*.txt' --output prepared/books --tokenizer books/tokenizer.json",
        "--input 'crawl/*.jsonl.zst' --output prepared/crawl --tokenizer tokenizer.model",
        "--input HuggingFaceTB/smollm-corpus:cosmopedia-v2 --output prepared/cosmopedia "
        "--tokenizer HuggingFaceTB/SmolLM2-135M",
        "--inspect prepared/books",
    )
    add = parser.add_argument
    add("--input", nargs="+", metavar="FILE_OR_GLOB_OR_HUB_ID", help="read in sorted order, hub data sets last")
    add("--output", type=to_path, metavar="DIR", help="a new directory, or an unfinished one to resume")
    add("--tokenizer", metavar="NAME_OR_FILE", help="bytes, a file (any kind), or a hub repository with tokenizer.json")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that tokenise; default: one a core")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at a damaged document; default: stop")
    add("--format", choices=("arrayrecord", "bin"), default="arrayrecord", help="bin: the official code's shards")
    add("--field", default="text", metavar="NAME", help="key or column that holds the text; default: text")
    add("--document-separator", metavar="REGEX", help="text files: a document starts where it matches")
    add("--split", default="train", help="of hub data sets; default: train")
    add("--shard-mb", type=float, default=256, metavar="MB", help="text in a shard; default: 256")
    add("--runner", choices=("local", "beam"), default="local", help="beam: Apache Beam, also on many machines")
    add("--beam-options", default="", metavar="TEXT", help='for Beam, such as "--runner=DataflowRunner --region=..."')
    add(
        "--inspect",
        type=to_path,
        metavar="DIR",
        help="show what a prepared directory holds, and check every byte of it",
    )
    args = parser.parse_args()
    if args.inspect:
        inspect(args.inspect)
        return
    missing = [name for name in ("input", "output", "tokenizer") if getattr(args, name) is None]
    problems = [f"--{name} is missing" for name in missing]
    problems += [f"--workers: found {args.workers}; at least 1"] if args.workers < 1 else []
    problems += [f"--shard-mb: found {args.shard_mb}; more than 0"] if args.shard_mb <= 0 else []
    if problem := pattern_problem(args.document_separator):
        problems.append(f"--{problem.replace('_', '-')}")
    if problems:
        raise UserError("\n".join(problems))
    settings = Settings(
        tokenizer=find_tokenizer(args.tokenizer),
        output=args.output,
        format=args.format,
        shard_bytes=int(args.shard_mb * 1e6),
        on_error=args.on_error,
        separator=args.document_separator,
        field=args.field,
        split=args.split,
    )
    run(args, settings)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Prepares, and prints a summary."""
    tokenizer = settings.load_tokenizer()
    inputs = open_inputs(
        args.input,
        field=settings.field,
        separator=settings.separator,
        split=settings.split,
        vocab_size=tokenizer.vocab_size,
        bos_id=next(iter(tokenizer.special.prefix_ids), None),
    )
    if args.runner == "beam":
        from lm2_jax.data.prepare.beam import run_on_beam

        manifest = prepare(inputs, settings, run_on_beam(args.beam_options.split()))
    else:
        with _bar() as show:
            manifest = prepare(inputs, settings, run_locally(args.workers, show))
    print(f"{settings.output}: {describe(manifest)}")
    for problem in manifest.problems[:5]:
        print(f"  left out: {problem}")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Tally], None]]:
    """Shows progress on a terminal; silent elsewhere."""
    console, since = Console(stderr=True), time.monotonic()
    text = TextColumn("{task.percentage:3.0f}%  {task.fields[tokens]}")
    settings = {"console": console, "disable": not console.is_terminal, "transient": True}
    with Progress(SpinnerColumn(), BarColumn(), text, TimeRemainingColumn(), **settings) as progress:
        task = progress.add_task("", tokens="", total=None)

        def show(tally: Tally) -> None:
            rate = tally.tokens / max(time.monotonic() - since, 1e-9)
            text = f"{tally.tokens:,} tokens, {rate:,.0f}/s" + (f", {tally.skipped:,} skipped" if tally.skipped else "")
            progress.update(task, completed=tally.read, total=tally.total, tokens=text)

        yield show


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
