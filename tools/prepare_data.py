"""Makes token shards from text, JSON lines, parquet, hub data sets and official shards; or inspects shards."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import _checkout  # noqa: F401
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from lm2_jax.common.errors import UserError, run_command
from lm2_jax.config import pattern_problem
from lm2_jax.data.documents import BinSource, DocumentSource
from lm2_jax.data.prepare.inputs import open_inputs
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import Settings, Tally, run_locally
from lm2_jax.data.prepared import (
    Manifest,
    PreparedSource,
    data_file,
    read_index,
    read_manifest,
    tokenizer_of,
    verify,
)
from lm2_jax.tokenizer import find_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXAMPLES = """examples:
  python tools/prepare_data.py --input 'books/*.txt' --output prepared/books --tokenizer books/tokenizer.json
  python tools/prepare_data.py --input 'crawl/*.jsonl.zst' --output prepared/crawl --tokenizer tokenizer.model
  python tools/prepare_data.py --input HuggingFaceTB/smollm-corpus:cosmopedia-v2 --output prepared/cosmopedia \\
      --tokenizer HuggingFaceTB/SmolLM2-135M
  python tools/prepare_data.py --inspect prepared/books

Then set data.source to prepared and data.path to the output. Called again, it resumes where it stopped. The output is
the same for any number of workers.
"""


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", metavar="FILE_OR_GLOB_OR_HUB_ID", help="read in sorted order, hub data sets last")
    add("--output", type=Path, metavar="DIR", help="a new directory, or an unfinished one to resume")
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
    add("--inspect", type=Path, metavar="DIR", help="show what a prepared directory holds, and check every byte of it")
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


def describe(manifest: Manifest) -> str:
    """Describes a manifest in one line."""
    text = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.shards):,} file(s)"
    if manifest.empty or manifest.skipped:
        text += f"; left out: {manifest.empty:,} empty, {manifest.skipped:,} damaged"
    return text


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


# --- Inspecting ----------------------------------------------------------------------------------------------------


def inspect(directory: Path) -> None:
    """Checks a directory, prints counts, lengths, documents and padding, and writes lengths.png into it.

    Raises UserError if the directory is not whole.
    """
    manifest = read_manifest(directory, "--inspect")
    verify(directory, manifest)
    source = _open(directory, manifest)
    lengths = read_index(directory, manifest)[:, 0]
    console = Console(width=None if sys.stdout.isatty() else 120)
    print(f"{directory}: {describe(manifest)}")
    print(
        f"  tokenizer {manifest.tokenizer.kind} {manifest.tokenizer.fingerprint}, {manifest.tokenizer.vocab_size:,} ids"
    )
    for entry in manifest.sources:
        known = {key: value for key, value in entry.items() if value}
        print(f"  from {known.pop('name', '?')}", *(f"{key} {value}" for key, value in known.items()), sep=", ")
    low, median, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    print(f"  tokens in a document: {low:,} to {high:,}, median {median:,}, mean {lengths.mean():,.1f}")
    console.print(padding_table(lengths))
    tokenizer = load_tokenizer(tokenizer_of(directory, manifest))
    for number in sorted({0, len(source) // 2, len(source) - 1}):
        text = tokenizer.decode(source[number].tokens)
        print(f"document {number}, {lengths[number]:,} tokens: {text[:300]!r}{'...' if len(text) > 300 else ''}")
    plot_lengths(lengths).savefig(directory / "lengths.png", dpi=150)
    print(f"written: {directory / 'lengths.png'}")


def _open(directory: Path, manifest: Manifest) -> DocumentSource:
    if manifest.format == "bin":
        paths = [data_file(directory, shard.name, "bin") for shard in manifest.shards]
        bos_id, *_ = load_tokenizer(tokenizer_of(directory, manifest)).special.prefix_ids
        return BinSource(paths, manifest.tokenizer.vocab_size, bos_id, key="--inspect")
    return PreparedSource([directory], key="--inspect")


def padding_table(lengths: np.ndarray) -> Table:
    """Tabulates the share of padding in lanes, by segment length and `data.boundaries`, for these document lengths."""
    table = Table(title="share of padding in lanes")
    for column in ("segment length", "boundaries: segment", "packed", "stream"):
        table.add_column(column, justify="right")
    positions = lengths[lengths >= 2].astype(np.int64) - 1
    for T in (32, 128, 512, 1024, 2048, 4096):
        laid_out = (-(-positions // T) * T).sum()
        share = 1 - positions.sum() / laid_out if laid_out else 0.0
        table.add_row(f"{T:,}", f"{share:.1%}", "0.0%", "0.0%")
    return table


def plot_lengths(lengths: np.ndarray) -> Figure:
    """Draws a histogram of document lengths."""
    from matplotlib.figure import Figure  # imported late so that --help stays fast

    figure = Figure(figsize=(6, 3.5), layout="tight")
    axes = figure.subplots()
    bins = np.geomspace(max(lengths.min(), 1), lengths.max() + 1, 60)
    axes.hist(lengths.clip(1), bins=bins)
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title=f"{len(lengths):,} documents")
    return figure


if __name__ == "__main__":
    run_command(main)
