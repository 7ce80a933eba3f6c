"""Shows what a prepared directory holds: counts, lengths, padding, some documents."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from lm2_jax.common.storage import AnyPath
from lm2_jax.common.trees import writing
from lm2_jax.data.documents import BinSource, DocumentSource
from lm2_jax.data.prepared import (
    Manifest,
    PreparedSource,
    data_file,
    read_index,
    read_manifest,
    tokenizer_of,
    verify,
)
from lm2_jax.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inspect(directory: AnyPath) -> None:
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
    with writing(directory / "lengths.png") as file:
        plot_lengths(lengths).savefig(file, dpi=150)
    print(f"written: {directory / 'lengths.png'}")


def describe(manifest: Manifest) -> str:
    """Describes a manifest in one line."""
    text = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.shards):,} file(s)"
    if manifest.empty or manifest.skipped:
        text += f"; left out: {manifest.empty:,} empty, {manifest.skipped:,} damaged"
    return text


def _open(directory: AnyPath, manifest: Manifest) -> DocumentSource:
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
