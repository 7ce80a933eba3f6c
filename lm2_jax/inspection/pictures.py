"""Pictures of a reading: each is drawn into a matplotlib figure of its own, or into a part of a larger one.

With many slots the ones read most are shown, the rest as one row; with many segments, neighbours are averaged.
Axes: L blocks or banks, S segments, K tokens, N slots, R rows and C columns of a picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm2_jax.data.babi.world import PEOPLE
from lm2_jax.inspection.reading import MemoryTrace
from lm2_jax.inspection.survival import Answers, Survival

MOST_SLOTS = 48  # shown one by one
MOST_COLUMNS = 128
MOST_BLOCKS = 3  # beside each other
_COLOURS = "Blues"


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Values under a part of a picture, to be shown where the pointer is.

    Attributes:
      box: left, top, width, height as shares of the picture.
      values_RC: from the top.
      rows, columns: what they are, for people.
      unit: what a value is.
    """

    box: tuple[float, float, float, float]
    values_RC: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    unit: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture to draw.

    Attributes:
      name: of its file.
      title: of its section.
      caption: how to read it.
      size: width and height in inches.
      draw: takes a figure or a subfigure; gives its heat maps as (axis, values, rows, columns, unit).
    """

    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Any], list[tuple[Any, np.ndarray, Sequence[str], Sequence[str], str]]]


# --- What is drawn --------------------------------------------------------------------------------------------------


def pictures(
    reading: MemoryTrace,
    words_K: Sequence[str],
    survival: Survival | None,
    answers: Answers | None = None,
) -> list[Picture]:
    """Of one reading, and of the stories that were asked about if there were any. words_K: the last tokens as text."""
    L, _, N = reading.read_LSN.shape
    few = f"All {N} slots." if N <= MOST_SLOTS else f"The {MOST_SLOTS} slots read most, of {N}; at the end: all others."
    found = [
        Picture(
            "tokens",
            "What the last tokens read",
            "Attention from each token to the slots, mean over heads, one block beside the other. "
            f"A line: a new segment. {few}",
            (4.8, 0.9 + 0.165 * len(words_K)),
            lambda figure: _draw_tokens(figure, reading, words_K),
        ),
        Picture(
            "reads",
            "Which slots are read, segment by segment",
            f"Attention from a segment's tokens to the slots, mean over tokens and heads. {few}",
            (4.8, 0.9 + 1.5 * min(L, MOST_BLOCKS)),
            lambda figure: _draw_by_segment(figure, reading.read_LSN, reading.read_LSN, "attention", "block"),
        ),
        Picture(
            "writes",
            "Which slots are rewritten, segment by segment",
            f"|slot after the segment - before| / |before|. {few}"
            + (" Orange: segments with a fact." if answers is not None else ""),
            (4.8, 0.9 + 1.5 * min(len(reading.change_LSN), MOST_BLOCKS)),
            lambda figure: _draw_by_segment(
                figure, reading.change_LSN, reading.read_LSN, "change", "bank", _fact_segments(answers)
            ),
        ),
        Picture(
            "gates",
            "How much each segment writes",
            "Above: the mean of the gates (input: how much of the new is taken; forget: how much of the old is kept; "
            "output: how much of what was read is let in). Below: the norm of a slot, and how much it changed."
            if reading.gates
            else "The norm of a slot, and how much it changed, mean over slots. This memory has no gates.",
            (4.8, 4.2 if reading.gates else 2.6),
            lambda figure: _draw_gates(figure, reading),
        ),
        Picture(
            "similarity",
            "How alike the slots are",
            "Cosines of the slots at the end, alike slots beside each other"
            + (f"; neighbours of the {N} are averaged." if N > MOST_COLUMNS else ".")
            + " Blue: alike; red: opposite; white: they have nothing in common.",
            (4.8, 2.5 if len(reading.slots_LNM) > 1 else 4.2),
            lambda figure: _draw_similarity(figure, reading),
        ),
    ]
    if survival is not None:
        found.append(
            Picture(
                "survival",
                "How long what was read survives",
                f"Share of {survival.title}, by how many segments ago it was read, with 95% intervals."
                + (" Grey: the same probe on the newest segment's own words." if survival.control is not None else ""),
                (4.8, 3.2),
                lambda figure: _draw_survival(figure, survival),
            )
        )
    if answers is not None:
        found.append(
            Picture(
                "facts",
                "What is written: facts against background",
                f"{len(answers.right_B)} stories. Left: how much slots change in segments with a fact and without. "
                "Right: the share of statements in what is written; dashed: their share of the tokens.",
                (4.8, 2.8),
                lambda figure: _draw_facts(figure, answers),
            )
        )
        if answers.taken_LNP is not None:
            found.append(
                Picture(
                    "people",
                    "Whose statements each slot takes",
                    "Attention of a slot to the statements about one person when memory is written, mean over heads "
                    f"and over the segments that have any. {few}",
                    (max(4.8, 0.8 * len(answers.taken_LNP)), 1.2 + 0.16 * min(N, MOST_SLOTS)),
                    lambda figure: _draw_people(figure, answers.taken_LNP, reading.read_LSN),
                )
            )
    return found


def render(picture: Picture, path: Any) -> list[HeatMap]:
    """Draws a picture into a PNG file (a path, or a binary file), and gives its heat maps."""
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
    """One PNG of several pictures beside each other."""
    height = max(picture.size[1] for picture in drawn)
    figure = _figure((4.8 * len(drawn), height + 0.6), dpi=100)
    parts = np.atleast_1d(figure.subfigures(1, len(drawn)))
    for part, picture in zip(parts, drawn, strict=True):
        part.suptitle(picture.title, fontsize=12)
        picture.draw(part)
    figure.suptitle(title, fontsize=13)
    figure.savefig(path)


def _figure(size: tuple[float, float], dpi: int) -> Any:
    from matplotlib.figure import Figure  # slow to import; and without pyplot, a notebook's own pictures stay its own

    return Figure(size, dpi=dpi, layout="constrained")


# --- The drawing -----------------------------------------------------------------------------------------------------


def _some(count: int) -> list[int]:
    """At most `MOST_BLOCKS` of `count` blocks: the first, the last, and between."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST_BLOCKS))})


def _shown_slots(weight_N: np.ndarray) -> list[int]:
    """All slots, or those with the largest weights, in their order."""
    if len(weight_N) <= MOST_SLOTS:
        return list(range(len(weight_N)))
    return sorted(np.argsort(-weight_N)[:MOST_SLOTS].tolist())


def _with_rest(values_XN: np.ndarray, slots: Sequence[int], mean: bool) -> tuple[np.ndarray, list[str]]:
    """Columns of the shown slots, and one of all others (their sum or mean) if there are any; with names."""
    names = [f"slot {slot}" for slot in slots]
    shown_Xn = values_XN[:, list(slots)]
    others = np.setdiff1d(np.arange(values_XN.shape[1]), slots)
    if not len(others):
        return shown_Xn, names
    rest_XN = values_XN[:, others]
    rest_X1 = (rest_XN.mean(1) if mean else rest_XN.sum(1))[:, None]
    return np.concatenate([shown_Xn, rest_X1], axis=1), [
        *names,
        f"{len(others)} other slots ({'mean' if mean else 'sum'})",
    ]


def _bins(values_RS: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """At most `MOST_COLUMNS` columns: means of neighbours, named from their first to their last."""
    S = values_RS.shape[1]
    if S <= MOST_COLUMNS:
        return values_RS, list(names)
    parts = np.split(np.arange(S), np.linspace(0, S, MOST_COLUMNS + 1)[1:-1].astype(int))  # evenly larger and smaller
    means_RC = np.stack([values_RS[:, part].mean(1) for part in parts], axis=1)
    return means_RC, [names[p[0]] if len(p) == 1 else f"{names[p[0]]} to {names[p[-1]]}" for p in parts]


def _draw_tokens(figure: Any, reading: MemoryTrace, words_K: Sequence[str]) -> list:
    L, K, N = reading.read_LKN.shape
    blocks = _some(L)
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    found = []
    for axis, block in zip(axes, blocks, strict=True):
        slots = _shown_slots(reading.read_LSN[block].mean(0))
        values_KC, names = _with_rest(reading.read_LKN[block], slots, mean=False)
        top = max(values_KC[:, : len(slots)].max(), 2 / N)  # an even share is at most half as dark
        axis.imshow(values_KC, aspect="auto", cmap=_COLOURS, vmin=0, vmax=top, interpolation="nearest")
        axis.set_title(f"block {block}", fontsize=10)
        axis.set_xlabel("slot", fontsize=9)
        axis.set_xticks(*_ticks(slots, 4), fontsize=8)
        axis.set_yticks(range(K), [_short(word) for word in words_K] if block == blocks[0] else [""] * K, fontsize=9)
        axis.tick_params(axis="y", length=0)
        for place in reading.segment_starts:
            axis.axhline(place - 0.5, color="tab:orange", linewidth=1)
        found.append((axis, values_KC, [repr(word) for word in words_K], names, f"attention, block {block}"))
    return found


def _ticks(slots: Sequence[int], most: int) -> tuple[list[int], list[str]]:
    """Places of a few slots on an axis, and their numbers."""
    places = sorted({round(i) for i in np.linspace(0, len(slots) - 1, min(len(slots), most))})
    return places, [str(slots[place]) for place in places]


def _short(word: str) -> str:
    word = "".join(c if _has_glyph(c) else ascii(c)[1:-1] for c in word.strip(" ")).replace("$", r"\$")
    return word if len(word) <= 12 else word[:11] + "…"


def _has_glyph(character: str) -> bool:
    """Whether matplotlib's font can draw it; of others it would warn, and draw a box."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return character.isprintable() and font.get_char_index(ord(character)) != 0


def _fact_segments(answers: Answers | None) -> list[int]:
    """Of the first story."""
    return [] if answers is None else np.flatnonzero(answers.contexts.person_BST[0].any(-1)).tolist()


def _draw_by_segment(
    figure: Any, values_LSN: np.ndarray, weight_LSN: np.ndarray, unit: str, of: str, marked: Sequence[int] = ()
) -> list:
    """weight_LSN: chooses the slots that are shown. marked: segments to point at."""
    blocks = _some(len(values_LSN))
    axes = figure.subplots(len(blocks), 1, squeeze=False, sharex=True)[:, 0]
    found = []
    for axis, block in zip(axes, blocks, strict=True):
        weight_N = weight_LSN[block].mean(0) if len(values_LSN) == len(weight_LSN) else weight_LSN.mean((0, 1))
        slots = _shown_slots(weight_N)
        values_SC, names = _with_rest(values_LSN[block], slots, mean=unit == "change")
        values_CS, segments = _bins(values_SC.T, [f"segment {s}" for s in range(len(values_SC))])
        top = np.quantile(values_CS[: len(slots)], 0.98) or 1.0
        image = axis.imshow(values_CS, aspect="auto", cmap=_COLOURS, vmin=0, vmax=top, interpolation="nearest")
        axis.set_ylabel(f"{of} {block}\nslot" if len(values_LSN) > 1 else "slot", fontsize=9)
        axis.set_yticks(*_ticks(slots, 4), fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        figure.colorbar(image, ax=axis, pad=0.01).ax.tick_params(labelsize=8)
        found.append((axis, values_CS, names, segments, f"{unit}, {of} {block}"))
    S, columns = values_LSN.shape[1], values_CS.shape[1]
    if marked:
        places, height = [segment * columns // S for segment in marked], axes[0].get_ylim()
        axes[0].plot(places, [-0.9] * len(places), "v", color="tab:orange", markersize=5, clip_on=False)
        axes[0].set_ylim(height)
    axes[-1].set_xlabel("segment", fontsize=9)
    places = sorted({round(i) for i in np.linspace(0, columns - 1, min(columns, 6))})
    axes[-1].set_xticks(places, [f"{place * S // columns:,}" for place in places])
    return found


def _draw_gates(figure: Any, reading: MemoryTrace) -> list:
    rows = [*([reading.gates] if reading.gates else []), {"norm": reading.norm_LSN, "change": reading.change_LSN}]
    axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    for axis, lines in zip(axes, rows, strict=True):
        for (name, values), style in zip(lines.items(), ("-", "--", ":"), strict=False):
            values_LS = values.mean(-1) if values.ndim == 3 else values
            for block, values_S in enumerate(values_LS):
                colour = _colour(block, len(values_LS))
                label = name if block == len(values_LS) - 1 else None
                axis.plot(values_S, style, color=colour, linewidth=1.1, label=label)
        axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderpad=0)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.margins(x=0.02)
    if reading.gates:
        axes[0].set(ylim=(0, 1.02), yticks=(0, 0.5, 1))
    count = max(len(values) for lines in rows for values in lines.values())
    shade = f"; the darker, the later the block (0 to {count - 1})" if count > 1 else ""
    axes[-1].set_xlabel(f"segment{shade}", fontsize=9)
    return []


def _colour(block: int, count: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis_r"](0.2 + 0.8 * (block + 1) / count)


def _draw_similarity(figure: Any, reading: MemoryTrace) -> list:
    banks = _some(len(reading.slots_LNM))
    axes = figure.subplots(1, len(banks), squeeze=False)[0]
    found = []
    for axis, bank in zip(axes, banks, strict=True):
        slots_NM = reading.slots_LNM[bank]
        unit_NM = slots_NM / np.maximum(np.linalg.norm(slots_NM, axis=-1, keepdims=True), 1e-9)
        order_N = _alike_beside_each_other(unit_NM)
        names = [f"slot {slot}" for slot in order_N]
        cosine_NN = (unit_NM @ unit_NM.T)[np.ix_(order_N, order_N)]
        cosine_RC, names = _bins(_bins(cosine_NN, names)[0].T, names)
        image = axis.imshow(cosine_RC, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(f"bank {bank}" if len(reading.slots_LNM) > 1 else "the memory", fontsize=10)
        axis.set(xticks=[], yticks=[])
        found.append((axis, cosine_RC, names, names, f"cosine, bank {bank}"))
    figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.02).ax.tick_params(labelsize=8)
    return found


def _alike_beside_each_other(unit_NM: np.ndarray) -> np.ndarray:
    """An order of the slots: around the circle of their first two principal components."""
    left_NN, *_ = np.linalg.svd(unit_NM - unit_NM.mean(0), full_matrices=False)
    return np.argsort(np.arctan2(left_NN[:, min(1, left_NN.shape[1] - 1)], left_NN[:, 0]))


def _draw_survival(figure: Any, survival: Survival) -> list:
    axis = figure.subplots()
    axis.vlines(survival.ages, survival.low, survival.high, color="tab:blue", linewidth=2, alpha=0.5)
    axis.plot(survival.ages, survival.accuracy, "o-", color="tab:blue", label="from the memory")
    if survival.control is not None:
        axis.plot(survival.ages, survival.control, "o--", color="tab:grey", markersize=4, label="from the newest words")
    axis.axhline(survival.chance, color="tab:red", linestyle=":", label="guessing")
    if survival.control is not None:
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks(survival.ages, [f"{age:g}" for age in survival.ages])
    axis.set(ylim=(0, 1.03))
    axis.set_xlabel("segments since it was read", fontsize=9)
    axis.set_ylabel("share right", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    return []


def _draw_people(figure: Any, taken_LNP: np.ndarray, weight_LSN: np.ndarray) -> list:
    """weight_LSN: chooses the slots that are shown."""
    axes = figure.subplots(1, len(taken_LNP), squeeze=False, sharey=True)[0]
    slots, found = _shown_slots(weight_LSN.mean((0, 1))), []
    for block, (axis, taken_NP) in enumerate(zip(axes, taken_LNP, strict=True)):
        values_PC, names = _with_rest(taken_NP.T, slots, mean=True)
        image = axis.imshow(values_PC.T, aspect="auto", cmap=_COLOURS, vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"block {block}", fontsize=10)
        axis.set_xticks(range(len(PEOPLE)), PEOPLE, fontsize=8, rotation=90)
        axis.set_yticks(*_ticks(slots, 8), fontsize=8)
        found.append((axis, values_PC.T, names, PEOPLE, f"attention, block {block}"))
    axes[0].set_ylabel("slot", fontsize=9)
    figure.colorbar(image, ax=list(axes), pad=0.01).ax.tick_params(labelsize=8)
    return found


def _draw_facts(figure: Any, answers: Answers) -> list:
    contexts, L, written = answers.contexts, len(answers.change_LBS), answers.written_LBST
    axes = figure.subplots(1, 1 if written is None else 2, squeeze=False)[0]
    fact_BS = contexts.person_BST.any(-1)
    groups: Mapping[str, tuple[np.ndarray, str, float]] = {
        "a fact": (fact_BS, "tab:orange", -0.2),
        "background": (~fact_BS, "tab:grey", 0.2),
    }
    for name, (chosen_BS, colour, shift) in groups.items():
        if not chosen_BS.any():
            continue
        means_L = [change_BS[chosen_BS].mean() for change_BS in answers.change_LBS]
        axes[0].bar(np.arange(L) + shift, means_L, width=0.38, color=colour, label=name)
    axes[0].set_ylabel("change of a slot", fontsize=9)
    axes[0].legend(fontsize=8)
    axes[0].set_xticks(range(L))
    axes[0].set_xlabel("bank", fontsize=9)
    if written is not None:
        share_L = (written * (contexts.person_BST > 0)).sum((1, 2, 3)) / written.sum((1, 2, 3))
        axes[1].bar(range(len(share_L)), share_L, width=0.5, color="tab:orange")
        axes[1].axhline((contexts.person_BST > 0).mean(), color="tab:grey", linestyle="--")
        axes[1].set(ylim=(0, 1), xticks=range(len(share_L)))
        axes[1].set_ylabel("share of statements", fontsize=9)
        axes[1].set_xlabel("block", fontsize=9)
    for axis in axes:
        axis.tick_params(labelsize=8)
    return []
