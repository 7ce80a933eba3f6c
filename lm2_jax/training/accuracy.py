"""Accuracy on question stories against context length: exact match of the answer, a fresh memory for every story.

Stories stream through the model window by window, so any length needs the memory of one window only.
Axes: B stories at a time, S segments, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from lm2_jax.batch import Batch
from lm2_jax.common.statistics import wilson_interval
from lm2_jax.config import Config, StageConfig
from lm2_jax.data.documents import Document, DocumentSource
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import batch_sharding, own_lanes, replicated, to_devices
from lm2_jax.segments import run_batch
from lm2_jax.training.state import StepConfig, shardings_of
from lm2_jax.training.step import make_fresh_memory


class Accuracy(TypedDict):
    """One cell of the table."""

    questions: str  # where they come from: "qa1 (generator)", or a file's name
    segments: int
    tokens: int  # of the longest context
    correct: int
    asked: int
    accuracy: float
    low: float  # 95% Wilson interval
    high: float


def accuracy_by_length(
    config: Config, model: Decoder, pipeline: Pipeline, mesh: Mesh, params: Any, log: Callable[[str | Table], None]
) -> list[Accuracy]:
    """Asks eval.questions questions of every set of the pipeline at every length of eval.lengths.

    The same stories are asked at every length that they fit; at length 0 they stand alone, without background. `log`
    receives a line before every cell of the table, and the table.
    """
    T, settings = config.trained_segment_length, StepConfig.of(config)
    answer_step = make_answer_step(model, mesh, settings)
    fresh_memory = make_fresh_memory(model, mesh, settings)(params)

    def count_correct(documents: Sequence[Document], window: StageConfig) -> int:
        B, memory = config.data.batch_size, fresh_memory
        wrong_B, own = np.zeros(B, np.int64), own_lanes(mesh, B)
        for batch in _windows(documents, window, B):
            own_rows = jax.tree.map(lambda array: array[own], batch)
            wrong_here_B, memory = answer_step(params, memory, to_devices(mesh, B, own_rows))
            wrong_B += np.asarray(wrong_here_B)
        return int(np.sum(wrong_B[: len(documents)] == 0))

    table: list[Accuracy] = []
    for name, make_source in pipeline.question_sets():
        for segments in config.eval.lengths:
            log(f"asking {config.eval.questions} questions of {name} after {segments} segments")
            source = make_source(segments * T or None)
            longest = segments * T or max(len(document.tokens) - 1 for document in source)
            window = _read_as(config, longest)
            correct = sum(count_correct(documents, window) for documents in _groups(source, config.data.batch_size))
            low, high = wilson_interval(correct, len(source))
            table.append(
                Accuracy(
                    questions=name,
                    segments=segments,
                    tokens=longest,
                    correct=correct,
                    asked=len(source),
                    accuracy=correct / len(source),
                    low=low,
                    high=high,
                )
            )
    log(accuracy_table(table, config.stages[-1].segments))
    return table


def accuracy_table(table: Sequence[Accuracy], trained_segments: int) -> Table:
    """The accuracies as a table for the terminal."""
    rendered = Table(title="Accuracy by context length (exact match, held-out stories)")
    for column in ("questions", "segments", "tokens", "accuracy", "95% interval", "asked"):
        rendered.add_column(column, justify="left" if column == "questions" else "right")
    for cell in table:
        ratio = cell["segments"] / trained_segments
        rendered.add_row(
            cell["questions"],
            f"{cell['segments']}{' (trained)' if ratio == 1 else f' ({ratio:g}x)' if ratio > 1 else ''}",
            f"{cell['tokens']:,}",
            f"{cell['accuracy']:.1%}",
            f"{cell['low']:.1%} - {cell['high']:.1%}",
            f"{cell['asked']:,}",
        )
    return rendered


@functools.cache
def make_answer_step(
    model: Decoder, mesh: Mesh, settings: StepConfig
) -> Callable[[Any, Any, Batch], tuple[jax.Array, Any]]:
    """A jitted (params, memory, batch) -> (wrong answer tokens of each lane [B], memory).

    Under greedy decoding an answer is exact if and only if, fed the true answer, every token of it is the argmax; so no
    decoding is needed.
    """

    def answer_step(params: Any, memory: Any, batch: Batch) -> tuple[jax.Array, Any]:
        hidden_BSTD, memory, _ = run_batch(model, params, batch, memory)
        logits_BSTV = model.apply({"params": params}, hidden_BSTD, method=Decoder.project)
        wrong_BST = (jnp.argmax(logits_BSTV, axis=-1) != batch.targets_BST) & batch.answers_BST
        return jnp.sum(wrong_BST, axis=(1, 2)), memory

    shardings = shardings_of(model, mesh, settings)
    return jax.jit(
        answer_step,
        in_shardings=(shardings.all_params, shardings.memory, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), shardings.memory),
    )


def _groups(source: DocumentSource, size: int) -> Iterator[list[Document]]:
    for start in range(0, len(source), size):
        yield [source[index] for index in range(start, min(start + size, len(source)))]


def _read_as(config: Config, tokens: int) -> StageConfig:
    """Shape of the windows that read contexts of up to `tokens` tokens: at most the longest of training."""
    last = config.stages[-1]
    if config.eval.one_segment:
        return StageConfig(segments=1, segment_length=-(-tokens // last.segment_length) * last.segment_length)
    return StageConfig(
        segments=min(-(-tokens // last.segment_length), last.segments), segment_length=last.segment_length
    )


def _windows(documents: Sequence[Document], stage: StageConfig, num_lanes: int) -> Iterator[Batch]:
    """Windows with one document in each lane, padded to whole windows; lanes without a document are all padding."""
    S, T = stage.segments, stage.segment_length
    windows = -(-max(len(document.tokens) - 1 for document in documents) // (S * T))
    whole = Batch.zeros(num_lanes, windows * S, T)
    for lane, document in enumerate(documents):
        n = len(document.tokens) - 1
        for array, values in (
            (whole.tokens_BST, document.tokens[:-1]),
            (whole.targets_BST, document.tokens[1:]),
            (whole.answers_BST, document.answers[1:]),
            (whole.document_BST, 1),
        ):
            array[lane].reshape(-1)[:n] = values
    whole.reset_BS[:, 0] = True
    for start in range(0, windows * S, S):
        yield jax.tree.map(lambda array, start=start: array[:, start : start + S], whole)
