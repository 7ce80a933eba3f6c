"""Perplexity: the loss over whole documents, by segment and by distance from the document's start.

Every document starts with fresh memory at the start of a segment, and is read exactly once, from its first token to its
last: there is no sliding window, and documents do not influence each other. Documents stream through lanes window by
window, so the devices hold one window at any length; the host holds the ids and losses of the documents in progress.
Axes: B lanes, S segments, T tokens, P positions of a document or of a lane's window, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.common.files import content_digest
from lm2_jax.common.progress import Progress
from lm2_jax.common.storage import AnyPath
from lm2_jax.data.documents import BinSource, DocumentSource
from lm2_jax.data.lanes import Lanes, Placement
from lm2_jax.evals import plots
from lm2_jax.evals.documents import open_documents, predicted_bytes
from lm2_jax.evals.model import EvalModel, Step
from lm2_jax.evals.position_loss import document_record, summarise
from lm2_jax.evals.results import ResultLog, finished_path
from lm2_jax.model.decoder import Decoder
from lm2_jax.segments import run_batch

Result = dict[str, Any]
_REPORT_SECONDS = 5.0


def evaluate(loaded: EvalModel, output: AnyPath | None, log: Callable[[str], None]) -> Result:
    """Reads every document of eval.perplexity.path, or of what the run held out.

    Finished documents are kept beside `output`, and are not read again. `log` receives progress lines.

    Returns JSON: `nats_per_token` over all predicted tokens, end tokens included, and its exponential `perplexity`;
    `bits_per_byte` of the text (null for token ids); `by_segment` and `by_distance` (tokens from the document's start,
    from and to inclusive).
    Raises UserError for documents that are missing or damaged, and for a memory kind whose tokens look ahead.
    """
    config = loaded.config
    if not loaded.model.kind.is_causal:
        raise UserError(
            f"memory.kind {config.memory.kind}: its tokens look ahead to the end of their segment, so its loss is not "
            "that of a language model, and its perplexity is not defined"
        )
    source, paths = open_documents(loaded)
    stage = config.stages[-1]
    lanes = Lanes(config.data.batch_size, stage.segments, stage.segment_length, "segment")
    results = ResultLog(finished_path(output), _identity(loaded, source, paths), key=("document",))
    _read_documents(loaded, source, lanes, results, log)
    records = [results[index,] for index in range(len(source)) if (index,) in results]
    if not records:
        raise UserError("eval.perplexity.path: no document has 2 tokens or more; one needs an input and a target")
    return {
        "task": "perplexity",
        "checkpoint": loaded.checkpoint,
        "segment_length": stage.segment_length,
        **summarise(records, stage.segment_length),
    }


def _identity(loaded: EvalModel, source: DocumentSource, paths: list[AnyPath]) -> dict[str, Any]:
    """Everything that a document's loss depends on."""
    config = loaded.config
    return {
        "evaluation": "perplexity",
        "parameters": loaded.fingerprint,
        "segment_length": config.trained_segment_length,
        "dtype": config.train.dtype,
        "files": [f"{path.name} ({path.stat().st_size} bytes)" for path in paths],
        "contents": [content_digest(path) for path in paths],
        "documents": repr(source),
        "settings": config.eval.perplexity.model_dump(mode="json", exclude={"path"}),
        "data": config.data.model_dump(mode="json", include={"document_separator", "validation_fraction", "begin_id"}),
        "seed": config.train.seed,
        "tokenizer": None if isinstance(source, BinSource) else loaded.tokenizer.fingerprint(),
    }


def _read_documents(
    loaded: EvalModel, source: DocumentSource, lanes: Lanes, results: ResultLog, log: Callable[[str], None]
) -> None:
    """Adds to `results` the records of all documents that it lacks."""
    left = [index for index in range(len(source)) if (index,) not in results]
    progress, num_read, num_tokens = Progress(log, len(left), _REPORT_SECONDS), 0, 0
    nll_step, memory = _make_step(loaded), loaded.fresh_memory()
    unfinished: dict[int, list[np.ndarray]] = {}  # nats so far of the documents in progress
    for window, placements in _windows(source, left, lanes):
        nll_BST, memory = nll_step(memory, window)
        nll_BP = np.asarray(nll_BST).reshape(lanes.num_lanes, -1)
        records, in_progress = [], 0.0
        for lane, placement in placements:
            start, end = max(placement.start, 0), min(placement.end, lanes.window_length)
            unfinished.setdefault(placement.ordinal, []).append(nll_BP[lane, start:end])
            num_tokens += end - start
            if placement.end > lanes.window_length:
                in_progress += (end - placement.start) / (placement.end - placement.start)
                continue
            nll_P = np.concatenate(unfinished.pop(placement.ordinal))
            text_bytes = predicted_bytes(placement.document, loaded)
            records.append(document_record(placement.ordinal, nll_P, lanes.segment_length, text_bytes))
        results.add(records)
        num_read += len(records)
        progress.report(
            num_read + in_progress,
            f"{len(source) - len(left) + num_read}/{len(source)} documents, {num_tokens:,} tokens, "
            f"{num_tokens / progress.elapsed:,.0f} tokens/s",
        )


def _windows(
    source: DocumentSource, indices: list[int], lanes: Lanes
) -> Iterator[tuple[Batch, list[tuple[int, Placement]]]]:
    """Yields windows that together hold every document once, each with all (lane, placement) that reach into it.

    A placement's ordinal is the index in `source`. Documents of one token are left out: they have nothing to predict.
    """
    following = (Placement(i, i, document, 0, n) for i in indices if (n := len((document := source[i]).tokens)) > 1)

    def next_placement(lane: int, start: int) -> Placement | None:
        placement = next(following, None)
        return placement and placement._replace(start=start)

    reading: list[Placement | None] = [None] * lanes.num_lanes
    while placements := lanes.fill(reading, next_placement):
        yield lanes.lay_out(placements), placements
        reading = lanes.reading_after(placements)


def _make_step(loaded: EvalModel) -> Step:
    """A jitted (memory, window) -> (nats of each target [B,S,T], memory)."""
    model = loaded.model

    def step(params: Any, memory: Any, window: Batch) -> tuple[jax.Array, Any]:
        hidden_BSTD, memory, _ = run_batch(model, params, window, memory)

        def segment(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden_BTD, targets_BT = inputs
            logits_BTV = model.apply({"params": params}, hidden_BTD, method=Decoder.project)
            return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)

        # One segment at a time, so that the logits of only one are held
        by_segment = (jnp.moveaxis(hidden_BSTD, 1, 0), jnp.moveaxis(window.targets_BST, 1, 0))
        return jnp.moveaxis(jax.lax.map(segment, by_segment), 0, 1), memory

    return loaded.jit(step)


# --- Tables and pictures -------------------------------------------------------------------------------------------


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


def draw(result: Result, output: AnyPath) -> list[AnyPath]:
    """Draws the loss by segment index; returns the picture's path, beside `output`."""
    return plots.draw_loss_by_segment(result, output)
