"""Perplexity: the loss over whole documents, by segment and by distance from the document's start.

Every document starts at a segment's start with fresh memory, and is read once from its first token to its last; nothing
slides, and no document hears of another. Documents stream through lanes window by window: the devices hold one window
whatever the length, the host the ids and the losses of the documents under way.
Axes: B lanes, S segments, T tokens, P positions of a document or of a lane's window, G groups of them, D model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.common.progress import clock
from lm2_jax.config import Config
from lm2_jax.data.documents import BinSource, DocumentSource, JsonLinesSource, TextSource
from lm2_jax.data.lanes import Lanes, Placement
from lm2_jax.data.paths import expand_paths
from lm2_jax.data.pipeline import Pipeline, held_out_files
from lm2_jax.evals.model import EvalModel
from lm2_jax.evals.results import ResultLog, finished_path
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import batch_sharding, memory_shardings, replicated
from lm2_jax.segments import run_batch

Result = dict[str, Any]
_FIRST_DISTANCES = 16  # tokens up to here are one group; the groups after it double
_POINTS = 100  # of the picture's curve


def evaluate(loaded: EvalModel, output: Path | None, log: Callable[[str], None]) -> Result:
    """Reads every document of eval.perplexity.path, or what the run held out.

    Finished documents are kept beside `output`, and are not read again. `say` is told what is going on.

    Returns JSON: `nats_per_token` over all predicted tokens, end tokens included, and its exponential `perplexity`;
    `bits_per_byte` of the text (null for token ids); `by_segment` and `by_distance` (tokens from the document's start,
    from and to inclusive).
    Raises UserError for documents that are missing or damaged, and for a memory kind that looks ahead.
    """
    config = loaded.config
    if not loaded.model.kind.is_causal:
        raise UserError(
            f"memory.kind {config.memory.kind}: its tokens look ahead to the end of their segment, so its loss is no "
            "language model's; there is no perplexity to measure"
        )
    source, paths = _documents(loaded)
    stage = config.stages[-1]
    T = stage.segment_length
    identity = {
        "evaluation": "perplexity",
        "parameters": loaded.fingerprint,
        "segment_length": T,
        "dtype": config.train.dtype,
        "files": [f"{path.name} ({path.stat().st_size} bytes)" for path in paths],
        "documents": repr(source),
        "settings": config.eval.perplexity.model_dump(mode="json", exclude={"path"}),
        "data": config.data.model_dump(mode="json", include={"document_separator", "validation_fraction", "begin_id"}),
        "seed": config.train.seed,
        "tokenizer": None if isinstance(source, BinSource) else loaded.tokenizer.fingerprint(),
    }
    finished = ResultLog(finished_path(output), identity, key=("document",))
    left = [index for index in range(len(source)) if (index,) not in finished]
    progress = _Progress(log, len(left), len(source))
    lanes = Lanes(config.data.batch_size, stage.segments, T, "segment")
    nll_step, memory = _make_step(loaded)
    read: dict[int, list[np.ndarray]] = {}  # nats so far of the documents that are under way
    for window, placements in _windows(source, left, lanes):
        nll_BST, memory = nll_step(loaded.params, memory, window)
        nll_BP = np.asarray(nll_BST).reshape(lanes.num_lanes, -1)
        done = []
        for lane, placement in placements:
            begin, end = max(placement.start, 0), min(placement.end, lanes.window_length)
            read.setdefault(placement.ordinal, []).append(nll_BP[lane, begin:end])
            if placement.end <= lanes.window_length:
                nll_P = np.concatenate(read.pop(placement.ordinal))
                done.append(_record(placement, nll_P, T, _text_bytes(placement, loaded)))
        finished.add(done)
        progress.advance(placements, lanes.window_length)
    records = [finished[index,] for index in range(len(source)) if (index,) in finished]
    if not records:
        raise UserError("eval.perplexity.path: no document has 2 tokens or more; one needs an input and a target")
    return {"task": "perplexity", "checkpoint": loaded.checkpoint, "segment_length": T, **_summarise(records, T)}


# --- Documents -----------------------------------------------------------------------------------------------------


def _documents(loaded: EvalModel) -> tuple[DocumentSource, list[Path]]:
    """The documents to read, and the files they come from."""
    config = loaded.config
    ask, key = config.eval.perplexity, "eval.perplexity.path"
    if ask.path is None:
        return _held_out(config, loaded)
    paths = expand_paths(ask.path, key)
    kinds = {ask.source or {".jsonl": "jsonl", ".bin": "bin"}.get(path.suffix, "text") for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{key}: files of several kinds ({', '.join(sorted(kinds))}); evaluate one kind at a time")
    if kinds == {"bin"}:
        return BinSource(paths, config.model.vocab_size, config.data.begin_id, key), paths
    if config.has_tokenizer and config.tokenizer.kind == "stories":
        raise UserError(
            f"{key}: tokenizer.kind stories knows only the generator's words; evaluate a model with another tokenizer"
        )
    if kinds == {"jsonl"}:
        return JsonLinesSource(paths, loaded.tokenizer, key), paths
    return TextSource(paths, loaded.tokenizer, ask.document_separator, key), paths


def _held_out(config: Config, loaded: EvalModel) -> tuple[DocumentSource, list[Path]]:
    """The run's own validation documents."""
    data = config.data
    if data.source == "stories":
        raise UserError("eval.perplexity.path is missing: name text files, JSON lines or .bin shards to read")
    _, source = Pipeline(config, None if data.source == "bin" else loaded.tokenizer).sources(config.stages[-1])
    if source is None:
        raise UserError("eval.perplexity.path is missing, and the run held nothing out (data.validation_fraction 0)")
    return source, held_out_files(data)


def _text_bytes(placement: Placement, loaded: EvalModel) -> int | None:
    """Bytes of the text that is predicted: without a begin token, nobody predicts the first one."""
    document = placement.document
    if document.text_bytes is None or loaded.tokenizer.bos_id is not None:
        return document.text_bytes
    return document.text_bytes - len(loaded.tokenizer.decode(document.tokens[:1]).encode())


def _windows(
    source: DocumentSource, indices: list[int], lanes: Lanes
) -> Iterator[tuple[Batch, list[tuple[int, Placement]]]]:
    """Every document once, in lanes; with each window all (lane, placement) that reach into it, numbered as in source.

    Those of one token are left out: they have nothing to predict.
    """
    following = (Placement(i, document, 0, n) for i in indices if (n := len((document := source[i]).tokens)) > 1)

    def next_placement(lane: int, start: int) -> Placement | None:
        placement = next(following, None)
        return placement and placement._replace(start=start)

    reading: list[Placement | None] = [None] * lanes.num_lanes
    while placements := lanes.fill(reading, next_placement):
        yield lanes.lay_out(placements), placements
        reading = lanes.reading_after(placements)


# --- The loss ------------------------------------------------------------------------------------------------------


def _make_step(loaded: EvalModel) -> tuple[Callable[..., tuple[jax.Array, Any]], Any]:
    """A jitted (params, memory, window) -> (nats of each target [B,S,T], memory), and the memory to begin with."""
    model, mesh = loaded.model, loaded.mesh

    def fresh(params: Any) -> Any:
        return model.init_memory(loaded.config.data.batch_size, params)

    def step(params: Any, memory: Any, window: Batch) -> tuple[jax.Array, Any]:
        hidden_BSTD, memory, _ = run_batch(model, params, window, memory)

        def segment(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden_BTD, targets_BT = inputs
            logits_BTV = model.apply({"params": params}, hidden_BTD, method=Decoder.project)
            return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)

        # One segment at a time, so that logits of one are held at once
        by_segment = (jnp.moveaxis(hidden_BSTD, 1, 0), jnp.moveaxis(window.targets_BST, 1, 0))
        return jnp.moveaxis(jax.lax.map(segment, by_segment), 0, 1), memory

    shardings = memory_shardings(mesh, jax.eval_shape(fresh, loaded.params), model.kind.lane_axis)
    params_shardings = jax.tree.map(lambda leaf: leaf.sharding, loaded.params)
    jitted = jax.jit(
        step,
        in_shardings=(params_shardings, shardings, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), shardings),
    )
    return jitted, jax.jit(fresh, out_shardings=shardings)(loaded.params)


def _record(placement: Placement, nll_P: np.ndarray, segment_length: int, text_bytes: int | None) -> Result:
    """What is kept of a document: its nats by segment and by distance."""
    position_P = np.arange(len(nll_P))
    return {
        "document": placement.ordinal,
        "tokens": len(nll_P),
        "bytes": text_bytes,
        "nats_by_segment": np.bincount(position_P // segment_length, nll_P).tolist(),
        "nats_by_distance": np.bincount(_distance_group(position_P), nll_P).tolist(),
    }


def _distance_group(position_P: np.ndarray) -> np.ndarray:
    """Position p, from 0, predicts the token at distance p + 1: 1-16, 17-32, 33-64 and so on."""
    return np.ceil(np.log2(np.maximum((position_P + 1) / _FIRST_DISTANCES, 1))).astype(int)


def _summarise(records: list[Result], segment_length: int) -> Result:
    tokens, longest = sum(record["tokens"] for record in records), max(record["tokens"] for record in records)
    nats = math.fsum(x for record in records for x in record["nats_by_segment"])
    segments = np.arange(0, longest, segment_length)
    distances = np.array([0, *(_FIRST_DISTANCES << k for k in range(longest.bit_length()))])
    distances = distances[distances < longest]
    text_bytes = sum(record["bytes"] for record in records) if all(r["bytes"] is not None for r in records) else None
    return {
        "documents": len(records),
        "tokens": tokens,
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bytes": text_bytes,
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "by_segment": [
            {"segment": number, **mean} for number, mean in enumerate(_means(records, "nats_by_segment", segments))
        ],
        "by_distance": [
            {"from": int(first) + 1, "to": int(last), **mean}
            for first, last, mean in zip(
                distances,
                np.append(distances[1:], longest),
                _means(records, "nats_by_distance", distances),
                strict=True,
            )
        ],
    }


def _means(records: list[Result], name: str, first_G: np.ndarray) -> list[Result]:
    """Tokens and mean nats of groups of positions, which begin at first_G."""
    width_G = np.diff(first_G, append=max(record["tokens"] for record in records))
    nats_G, tokens_G = np.zeros(len(first_G)), np.zeros(len(first_G), int)
    for record in records:
        nats_G[: len(record[name])] += record[name]
        tokens_G += np.clip(record["tokens"] - first_G, 0, width_G)
    return [
        {"tokens": int(count), "nats_per_token": float(total / count)}
        for count, total in zip(tokens_G, nats_G, strict=True)
    ]


class _Progress:
    """Says how many documents are read, at most every few seconds, and the time that the others take at this rate."""

    _SECONDS = 5.0

    def __init__(self, log: Callable[[str], None], left: int, total: int) -> None:
        self._say, self._left, self._total = log, left, total
        self._began = self._said = time.monotonic()
        self._done, self._tokens = 0, 0

    def advance(self, placements: list[tuple[int, Placement]], window_length: int) -> None:
        """After a window with these placements."""
        ends = [(placement, min(placement.end, window_length)) for _, placement in placements]
        self._done += sum(placement.end <= window_length for placement, _ in ends)
        self._tokens += sum(end - max(placement.start, 0) for placement, end in ends)
        now = time.monotonic()
        if now - self._said < self._SECONDS and self._done < self._left:
            return
        self._said = now
        under_way = sum((end - p.start) / (p.end - p.start) for p, end in ends if p.end > window_length)
        seconds = (now - self._began) * (self._left - self._done - under_way) / (self._done + under_way)
        self._say(
            f"{self._total - self._left + self._done}/{self._total} documents, {self._tokens:,} tokens, "
            f"{self._tokens / (now - self._began):,.0f} tokens/s, {clock(seconds)} left"
        )


# --- What it looks like --------------------------------------------------------------------------------------------


def tables(result: Result) -> list[Table]:
    """The totals, and the loss by distance, for the terminal."""
    totals = Table(title="Perplexity")
    bits = result["bits_per_byte"]
    for column in ("documents", "tokens", "nats per token", "perplexity", "bits per byte"):
        totals.add_column(column, justify="right")
    totals.add_row(
        f"{result['documents']:,}",
        f"{result['tokens']:,}",
        f"{result['nats_per_token']:.4f}",
        f"{result['perplexity']:,.2f}",
        "-" if bits is None else f"{bits:.4f}",
    )
    by_distance = Table(
        title=f"Loss by distance from the document's start (segments of {result['segment_length']} tokens)"
    )
    for column in ("distance, tokens", "tokens", "nats per token"):
        by_distance.add_column(column, justify="right")
    for row in result["by_distance"]:
        by_distance.add_row(f"{row['from']:,} - {row['to']:,}", f"{row['tokens']:,}", f"{row['nats_per_token']:.4f}")
    return [totals, by_distance]


def draw(result: Result, output: Path) -> list[Path]:
    """A picture beside `output`: loss by segment index."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path, rows = output.with_suffix(".png"), result["by_segment"]
    tokens, means = (np.array([row[name] for row in rows]) for name in ("tokens", "nats_per_token"))
    step = -(-len(rows) // _POINTS)
    first = np.arange(0, len(rows), step)
    grouped = np.add.reduceat(tokens * means, first) / np.add.reduceat(tokens, first)
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    if step > 1:
        axis.plot(means, color="tab:blue", linewidth=0.4, alpha=0.35, label="one segment")
    label = "one segment" if step == 1 else f"mean of {step} segments"
    axis.plot(first + (step - 1) / 2, grouped, "o-", color="tab:blue", markersize=3, linewidth=1.2, label=label)
    axis.axhline(result["nats_per_token"], color="grey", linestyle=":", label="all tokens")
    axis.set(
        xlabel=f"segment of the document, from 0 ({result['segment_length']} tokens each)",
        ylabel="nats per token",
        title=f"Loss by segment; documents: {result['documents']:,}",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]
