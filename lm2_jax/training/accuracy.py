"""Accuracy on question stories against context length: exact match of the answer, memory fresh for every story.

Stories stream through the model window by window, so any length costs the memory of one window.
Axes: B stories at a time, S segments, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm2_jax.config import Config, StageConfig
from lm2_jax.data.documents import Document, DocumentSource
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.model.decoder import Decoder
from lm2_jax.parallel.mesh import batch_sharding, own_lanes, replicated, to_devices
from lm2_jax.segments import run_window
from lm2_jax.training.state import TrainState
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
    config: Config,
    model: Decoder,
    pipeline: Pipeline,
    mesh: Mesh,
    state: TrainState,
    shardings: TrainState,
    progress: Callable[[str], None],
) -> list[Accuracy]:
    """Asks eval.questions questions of every set of the pipeline at every length of eval.lengths.

    The same stories are asked at every length that they fit; at length 0 they stand alone, without background.
    `progress` is told what is going on.
    """
    T = config.trained_segment_length
    answer = make_answer_step(model, mesh, shardings)
    fresh = make_fresh_memory(model, shardings)(state.params)
    table: list[Accuracy] = []
    for name, make_source in pipeline.question_sets():
        for segments in config.eval.lengths:
            progress(f"asking {config.eval.questions} questions of {name} after {segments} segments")
            source = make_source(segments * T or None)
            longest = segments * T or max(len(document.tokens) - 1 for document in source)
            window = _read_as(config, longest)
            correct = sum(
                _ask(answer, state.params, fresh, documents, window, config.data.batch_size, mesh)
                for documents in _groups(source, config.data.batch_size)
            )
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
    return table


def make_answer_step(model: Decoder, mesh: Mesh, shardings: TrainState) -> Callable[..., tuple[jax.Array, Any]]:
    """A jitted (params, memory, window) -> (wrong answer tokens of each lane [B], memory).

    Under greedy decoding an answer is exact if and only if, fed the true answer, every token of it comes out most
    likely; so no decoding is needed.
    """

    def answer_step(params: Any, memory: Any, window: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        hidden_BSTD, memory, _ = run_window(
            model, params, window["tokens_BST"], memory, window["reset_BS"], window["document_BST"], "auto", False
        )
        logits_BSTV = model.apply({"params": params}, hidden_BSTD, method="project")
        wrong_BST = (jnp.argmax(logits_BSTV, axis=-1) != window["targets_BST"]) & window["answers_BST"]
        return jnp.sum(wrong_BST, axis=(1, 2)), memory

    return jax.jit(
        answer_step,
        in_shardings=(shardings.params, shardings.memory, batch_sharding(mesh)),
        out_shardings=(replicated(mesh), shardings.memory),
    )


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95% by default."""
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = (centre - half) / (1 + z**2 / trials), (centre + half) / (1 + z**2 / trials)
    return max(low, 0.0), min(high, 1.0)  # at 0 and 1 but for rounding


def _ask(
    answer: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    memory: Any,
    documents: Sequence[Document],
    shape: StageConfig,
    num_lanes: int,
    mesh: Mesh,
) -> int:
    """How many of the documents' answers are exact."""
    wrong_B, own = np.zeros(num_lanes, np.int64), own_lanes(mesh, num_lanes)
    for window in _windows(documents, shape, num_lanes):
        own_rows = {name: array[own] for name, array in window.items()}
        wrong_here_B, memory = answer(params, memory, to_devices(mesh, num_lanes, own_rows))
        wrong_B += np.asarray(wrong_here_B)
    return int(np.sum(wrong_B[: len(documents)] == 0))


def _groups(source: DocumentSource, size: int) -> Iterator[list[Document]]:
    for start in range(0, len(source), size):
        yield [source[index] for index in range(start, min(start + size, len(source)))]


def _read_as(config: Config, tokens: int) -> StageConfig:
    """The window in which contexts of up to `tokens` tokens are read: at most the longest one in training."""
    last = config.stages[-1]
    if config.eval.one_segment:
        return StageConfig(segments=1, segment_length=-(-tokens // last.segment_length) * last.segment_length)
    return StageConfig(
        segments=min(-(-tokens // last.segment_length), last.segments), segment_length=last.segment_length
    )


def _windows(documents: Sequence[Document], stage: StageConfig, num_lanes: int) -> Iterator[dict[str, np.ndarray]]:
    """One document a lane, padded to whole windows; lanes without one are all padding."""
    width = stage.segments * stage.segment_length
    length = -(-max(len(document.tokens) - 1 for document in documents) // width) * width
    tokens, targets = np.zeros((num_lanes, length), np.int32), np.zeros((num_lanes, length), np.int32)
    answers, filled = np.zeros((num_lanes, length), bool), np.zeros((num_lanes, length), np.int32)
    for lane, document in enumerate(documents):
        n = len(document.tokens) - 1
        tokens[lane, :n], targets[lane, :n] = document.tokens[:-1], document.tokens[1:]
        answers[lane, :n], filled[lane, :n] = document.answers[1:], 1
    arrays = {"tokens_BST": tokens, "targets_BST": targets, "answers_BST": answers, "document_BST": filled}
    for start in range(0, length, width):
        shape = (num_lanes, stage.segments, stage.segment_length)
        window = {name: array[:, start : start + width].reshape(shape) for name, array in arrays.items()}
        window["reset_BS"] = np.zeros(shape[:2], bool)
        window["reset_BS"][:, 0] = start == 0
        yield window
