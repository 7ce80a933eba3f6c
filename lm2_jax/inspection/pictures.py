"""Pictures of a memory trace: their titles, captions and sizes, rendered one by one or together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm2_jax.inspection.drawing import (
    MOST_BLOCKS,
    MOST_COLUMNS,
    MOST_SLOTS,
    draw_by_segment,
    draw_facts,
    draw_gates,
    draw_people,
    draw_similarity,
    draw_survival,
    draw_tokens,
    fact_segments,
)
from lm2_jax.inspection.reading import MemoryTrace
from lm2_jax.inspection.survival import Answers, Survival


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Values under an area of a picture, shown at the pointer.

    Attributes:
      box: left, top, width, height as fractions of the picture.
      values_RC: from the top.
      row_names, column_names: shown with a value.
      unit: of the values.
    """

    box: tuple[float, float, float, float]
    values_RC: np.ndarray
    row_names: Sequence[str]
    column_names: Sequence[str]
    unit: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to draw.

    Attributes:
      name: of its file.
      title: of its section.
      caption: how to read it.
      size: width and height in inches.
      draw: a function of drawing.py on a figure or a subfigure.
    """

    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Any], list[tuple[Any, np.ndarray, Sequence[str], Sequence[str], str]]]


def pictures(
    trace: MemoryTrace, words_K: Sequence[str], survival: Survival | None, answers: Answers | None = None
) -> list[Picture]:
    """Pictures of a trace, and of the stories whose questions were asked, if any. words_K: the last tokens as text."""
    L, _, N = trace.read_LSN.shape
    few = f"All {N} slots." if N <= MOST_SLOTS else f"The {MOST_SLOTS} slots read most, of {N}; at the end: all others."
    found = [
        Picture(
            "tokens",
            "What the last tokens read",
            "Attention from each token to the slots, mean over heads, one block beside the other. "
            f"A line: a new segment. {few}",
            (4.8, 0.9 + 0.165 * len(words_K)),
            lambda figure: draw_tokens(figure, trace, words_K),
        ),
        Picture(
            "reads",
            "Which slots are read, segment by segment",
            f"Attention from a segment's tokens to the slots, mean over tokens and heads. {few}",
            (4.8, 0.9 + 1.5 * min(L, MOST_BLOCKS)),
            lambda figure: draw_by_segment(figure, trace.read_LSN, trace.read_LSN, "attention", "block"),
        ),
        Picture(
            "writes",
            "Which slots are rewritten, segment by segment",
            f"|slot after the segment - before| / |before|. {few}"
            + (" Orange: segments with a fact." if answers is not None else ""),
            (4.8, 0.9 + 1.5 * min(len(trace.change_LSN), MOST_BLOCKS)),
            lambda figure: draw_by_segment(
                figure, trace.change_LSN, trace.read_LSN, "change", "bank", fact_segments(answers)
            ),
        ),
        Picture(
            "gates",
            "How much each segment writes",
            "Above: the mean of the gates (input: how much of the new is taken; forget: how much of the old is kept; "
            "output: how much of what was read is let in). Below: the norm of a slot, and how much it changed."
            if trace.gates
            else "The norm of a slot, and how much it changed, mean over slots. This memory has no gates.",
            (4.8, 4.2 if trace.gates else 2.6),
            lambda figure: draw_gates(figure, trace),
        ),
        Picture(
            "similarity",
            "How alike the slots are",
            "Cosines of the slots at the end, similar slots beside each other"
            + (f"; neighbours of the {N} are averaged." if N > MOST_COLUMNS else ".")
            + " Blue: alike; red: opposite; white: orthogonal.",
            (4.8, 2.5 if len(trace.slots_LNM) > 1 else 4.2),
            lambda figure: draw_similarity(figure, trace),
        ),
    ]
    if survival is not None:
        found.append(_survival_picture(survival))
    return found if answers is None else [*found, *_story_pictures(trace, answers, few)]


def _survival_picture(survival: Survival) -> Picture:
    return Picture(
        "survival",
        "How long what was read survives",
        f"Share of {survival.title}, by how many segments ago it was read, with 95% intervals."
        + (" Grey: the same probe on the newest segment's own words." if survival.control is not None else ""),
        (4.8, 3.2),
        lambda figure: draw_survival(figure, survival),
    )


def _story_pictures(trace: MemoryTrace, answers: Answers, few: str) -> list[Picture]:
    facts = Picture(
        "facts",
        "What is written: facts against background",
        f"{len(answers.right_B)} stories. Left: how much slots change in segments with a fact and without. "
        "Right: the share of statements in what is written; dashed: their share of the tokens.",
        (4.8, 2.8),
        lambda figure: draw_facts(figure, answers),
    )
    if answers.taken_LNP is None:
        return [facts]
    people = Picture(
        "people",
        "Whose statements each slot takes",
        "Attention of a slot to the statements about one person when memory is written, mean over heads and over the "
        f"segments that have any. {few}",
        (max(4.8, 0.8 * len(answers.taken_LNP)), 1.2 + 0.16 * min(trace.read_LSN.shape[2], MOST_SLOTS)),
        lambda figure: draw_people(figure, answers.taken_LNP, trace.read_LSN),
    )
    return [facts, people]


def render(picture: Picture, path: Any) -> list[HeatMap]:
    """Draws a picture into a PNG file (a path, or a binary file); returns its heat maps."""
    figure = _figure(picture.size, dpi=150)
    drawn = picture.draw(figure)
    figure.draw_without_rendering()
    found = []
    for axis, *rest in drawn:
        x0, y0, width, height = axis.get_position().bounds
        found.append(HeatMap((x0, 1 - y0 - height, width, height), *rest))
    figure.savefig(path)
    return found


def render_together(drawn: Sequence[Picture], path: Any, title: str) -> None:
    """Draws several pictures beside each other into one PNG."""
    height = max(picture.size[1] for picture in drawn)
    figure = _figure((4.8 * len(drawn), height + 0.6), dpi=100)
    for panel, picture in zip(np.atleast_1d(figure.subfigures(1, len(drawn))), drawn, strict=True):
        panel.suptitle(picture.title, fontsize=12)
        picture.draw(panel)
    figure.suptitle(title, fontsize=13)
    figure.savefig(path)


def _figure(size: tuple[float, float], dpi: int) -> Any:
    from matplotlib.figure import Figure  # imported late; without pyplot, a notebook's own pictures stay its own

    return Figure(size, dpi=dpi, layout="constrained")
