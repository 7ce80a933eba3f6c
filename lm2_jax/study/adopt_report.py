"""Tables and pictures of the study of docs/adopt.md, from the JSON of its cells alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure  # without pyplot, no display is needed

from lm2_jax.study.report import table
from lm2_jax.study.results import Result, mean_and_interval, read_results


def write_report(output: Path) -> str:
    """Writes report.md and the pictures into `output`, from output/cells/*.json; returns the report's text."""
    results = read_results(output)
    facts, books = ([result for result in results if result["part"] == part] for part in ("facts", "books"))
    text = "\n\n".join([*([_facts(facts, output)] if facts else []), *([_books(books, output)] if books else [])])
    (output / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


# --- Facts ---------------------------------------------------------------------------------------------------------


def _facts(results: Sequence[Result], output: Path) -> str:
    """Accuracy by length, a line for each cell and set of questions; the picture has the first set."""
    segments = sorted({cell["segments"] for result in results for cell in result["accuracy_by_length"]})
    head = ["trained", "seed", "tokens", "questions", *(f"{count} segments" for count in segments)]
    rows = []
    for result in results:
        for questions in dict.fromkeys(cell["questions"] for cell in result["accuracy_by_length"]):
            by_length = {c["segments"]: c for c in result["accuracy_by_length"] if c["questions"] == questions}
            cells = [f"{by_length[count]['accuracy']:.0%}" if count in by_length else "" for count in segments]
            rows.append([result["trained"], str(result["seed"]), f"{result['tokens']:,}", questions, *cells])
    figure = Figure((6, 4))
    axis = figure.subplots()
    for result in results:
        first = result["accuracy_by_length"][0]["questions"]
        by_length = [c for c in result["accuracy_by_length"] if c["questions"] == first]
        x, y, low, high = (np.array([c[key] for c in by_length]) for key in ("segments", "accuracy", "low", "high"))
        axis.errorbar(x, y, (y - low, high - y), capsize=2, label=f"{result['trained']}, seed {result['seed']}")
    axis.axhline(1 / 6, color="gray", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="segments of context", ylabel="answers right (95% interval)", ylim=(0, 1.02))
    axis.set_xticks(segments, segments)
    axis.minorticks_off()
    axis.legend(fontsize=7)
    figure.savefig(output / "facts.png", dpi=120, bbox_inches="tight")
    return "\n".join(["## Facts", "", *table(head, rows)])


# --- Books ---------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A paired difference of mean losses over documents, in nats a token.

    Attributes:
      nats: of all tokens together; negative: the first model is better.
      half: half of the 95% interval, by Student's t over documents weighted by their tokens: 0 where all differ alike.
      documents: that reach so far.
    """

    nats: float
    half: float
    documents: int


def paired_difference(one: Result, other: Result, first_segment: int) -> Difference:
    """The difference of `one` to `other` over the tokens from `first_segment` on, of the same documents."""
    pairs = []
    segment_length = one["segment_length"]
    for a, b in zip(one["documents"], other["documents"], strict=True):
        if (a["document"], a["tokens"]) != (b["document"], b["tokens"]):
            raise ValueError(f"documents {a['document']} and {b['document']} are not the same")
        tokens = a["tokens"] - first_segment * segment_length
        if tokens > 0:
            pairs.append(
                (sum(a["nats_by_segment"][first_segment:]) - sum(b["nats_by_segment"][first_segment:]), tokens)
            )
    nats_N, tokens_N = (np.array(column, float) for column in zip(*pairs, strict=True))
    nats = float(nats_N.sum() / tokens_N.sum())
    weighted_N = (nats_N - nats * tokens_N) / tokens_N.mean()  # how far each document moves the difference
    _, half = mean_and_interval(weighted_N.tolist())
    return Difference(nats, half, len(pairs))


def mean_loss(result: Result, first_segment: int) -> float:
    """Nats a token, over the tokens from `first_segment` on of all documents; nan where none reaches so far."""
    tokens = sum(max(0, d["tokens"] - first_segment * result["segment_length"]) for d in result["documents"])
    nats = math.fsum(x for d in result["documents"] for x in d["nats_by_segment"][first_segment:])
    return nats / tokens if tokens else math.nan


def _books(results: Sequence[Result], output: Path) -> str:
    """Losses, and the difference of each cell to LoRA alone with the same seed, beyond two segments."""
    head = ["trained", "seed", "tokens", "nats a token", "beyond 2T", "difference to LoRA beyond 2T"]
    rows = []
    lora = {result["seed"]: result for result in results if result["trained"] == "LoRA"}
    for result in results:
        beside = lora.get(result["seed"])
        text = ""
        if beside is not None and beside is not result:
            difference = paired_difference(result, beside, 2)
            text = f"{difference.nats:+.4f} ± {difference.half:.4f} ({difference.documents} chapters)"
        row = [result["trained"], str(result["seed"]), f"{result['tokens']:,}"]
        rows.append([*row, f"{mean_loss(result, 0):.4f}", f"{mean_loss(result, 2):.4f}", text])
    figure = Figure((6, 4))
    axis = figure.subplots()
    for result in results:
        groups = max(len(document["nats_by_distance"]) for document in result["documents"])
        ends = [16 * 2**k for k in range(groups)]
        axis.plot(ends, _by_distance(result, groups), marker="o", markersize=3, label=result["trained"])
    axis.set(xscale="log", xlabel="tokens from the chapter's start", ylabel="nats a token")
    axis.legend(fontsize=8)
    figure.savefig(output / "books.png", dpi=120, bbox_inches="tight")
    return "\n".join(["## Books", "", *table(head, rows)])


def _by_distance(result: Result, groups: int) -> list[float]:
    """Mean loss at 1-16, 17-32, 33-64 and so on tokens from the document's start."""
    first = [0, *(16 * 2**k for k in range(groups))]
    means = []
    for group in range(groups):
        own = [d for d in result["documents"] if len(d["nats_by_distance"]) > group]
        tokens = sum(min(d["tokens"], first[group + 1]) - first[group] for d in own)
        means.append(math.fsum(d["nats_by_distance"][group] for d in own) / tokens)
    return means
