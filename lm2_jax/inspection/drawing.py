"""Drawings of a memory trace, each into a matplotlib figure or a part of one.

With many slots the ones read most are shown, the rest as one row; with many segments, neighbours are averaged. Each
`draw_` function returns its heat maps as (axis, values, row names, column names, unit).
Axes: L blocks or banks, S segments, K tokens, N slots, R rows and C columns of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm2_jax.data.babi.world import PEOPLE
from lm2_jax.inspection.reading import MemoryTrace
from lm2_jax.inspection.survival import Answers, Survival

MOST_SLOTS = 48  # shown one by one
MOST_COLUMNS = 128
MOST_BLOCKS = 3  # beside each other
_COLOURS = "Blues"


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
    bins = np.split(np.arange(S), np.linspace(0, S, MOST_COLUMNS + 1)[1:-1].astype(int))  # evenly larger and smaller
    means_RC = np.stack([values_RS[:, members].mean(1) for members in bins], axis=1)
    return means_RC, [names[b[0]] if len(b) == 1 else f"{names[b[0]]} to {names[b[-1]]}" for b in bins]


def draw_tokens(figure: Any, trace: MemoryTrace, words_K: Sequence[str]) -> list:
    """Attention of the last tokens, as words, to the slots."""
    L, K, N = trace.read_LKN.shape
    blocks = _some(L)
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    found = []
    for axis, block in zip(axes, blocks, strict=True):
        slots = _shown_slots(trace.read_LSN[block].mean(0))
        values_KC, names = _with_rest(trace.read_LKN[block], slots, mean=False)
        top = max(values_KC[:, : len(slots)].max(), 2 / N)  # an even share is at most half as dark
        axis.imshow(values_KC, aspect="auto", cmap=_COLOURS, vmin=0, vmax=top, interpolation="nearest")
        axis.set_title(f"block {block}", fontsize=10)
        axis.set_xlabel("slot", fontsize=9)
        axis.set_xticks(*_ticks(slots, 4), fontsize=8)
        axis.set_yticks(range(K), [_short(word) for word in words_K] if block == blocks[0] else [""] * K, fontsize=9)
        axis.tick_params(axis="y", length=0)
        for start in trace.segment_starts:
            axis.axhline(start - 0.5, color="tab:orange", linewidth=1)
        found.append((axis, values_KC, [repr(word) for word in words_K], names, f"attention, block {block}"))
    return found


def _ticks(slots: Sequence[int], most: int) -> tuple[list[int], list[str]]:
    """Positions of a few slots on an axis, and their numbers."""
    positions = sorted({round(i) for i in np.linspace(0, len(slots) - 1, min(len(slots), most))})
    return positions, [str(slots[position]) for position in positions]


def _short(word: str) -> str:
    word = "".join(c if _has_glyph(c) else ascii(c)[1:-1] for c in word.strip(" ")).replace("$", r"\$")
    return word if len(word) <= 12 else word[:11] + "…"


def _has_glyph(character: str) -> bool:
    """True if matplotlib's font has the character; for others it would warn, and draw a box."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return character.isprintable() and font.get_char_index(ord(character)) != 0


def fact_segments(answers: Answers | None) -> list[int]:
    """Segments of the first story that hold a fact."""
    return [] if answers is None else np.flatnonzero(answers.contexts.person_BST[0].any(-1)).tolist()


def draw_by_segment(
    figure: Any, values_LSN: np.ndarray, weight_LSN: np.ndarray, unit: str, of: str, marked: Sequence[int] = ()
) -> list:
    """Values of every slot, segment by segment. weight_LSN: selects the slots to show. marked: segments to point at."""
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
    S, C = values_LSN.shape[1], values_CS.shape[1]
    if marked:
        at, height = [segment * C // S for segment in marked], axes[0].get_ylim()
        axes[0].plot(at, [-0.9] * len(at), "v", color="tab:orange", markersize=5, clip_on=False)
        axes[0].set_ylim(height)
    axes[-1].set_xlabel("segment", fontsize=9)
    at = sorted({round(i) for i in np.linspace(0, C - 1, min(C, 6))})
    axes[-1].set_xticks(at, [f"{column * S // C:,}" for column in at])
    return found


def draw_gates(figure: Any, trace: MemoryTrace) -> list:
    """Means of the gates, norms and changes of the slots, segment by segment."""
    rows = [*([trace.gates] if trace.gates else []), {"norm": trace.norm_LSN, "change": trace.change_LSN}]
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
    if trace.gates:
        axes[0].set(ylim=(0, 1.02), yticks=(0, 0.5, 1))
    count = max(len(values) for lines in rows for values in lines.values())
    shade = f"; the darker, the later the block (0 to {count - 1})" if count > 1 else ""
    axes[-1].set_xlabel(f"segment{shade}", fontsize=9)
    return []


def _colour(block: int, count: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis_r"](0.2 + 0.8 * (block + 1) / count)


def draw_similarity(figure: Any, trace: MemoryTrace) -> list:
    """Cosines between the slots at the end."""
    banks = _some(len(trace.slots_LNM))
    axes = figure.subplots(1, len(banks), squeeze=False)[0]
    found = []
    for axis, bank in zip(axes, banks, strict=True):
        slots_NM = trace.slots_LNM[bank]
        unit_NM = slots_NM / np.maximum(np.linalg.norm(slots_NM, axis=-1, keepdims=True), 1e-9)
        order_N = _alike_beside_each_other(unit_NM)
        names = [f"slot {slot}" for slot in order_N]
        cosine_NN = (unit_NM @ unit_NM.T)[np.ix_(order_N, order_N)]
        cosine_RC, names = _bins(_bins(cosine_NN, names)[0].T, names)
        image = axis.imshow(cosine_RC, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(f"bank {bank}" if len(trace.slots_LNM) > 1 else "the memory", fontsize=10)
        axis.set(xticks=[], yticks=[])
        found.append((axis, cosine_RC, names, names, f"cosine, bank {bank}"))
    figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.02).ax.tick_params(labelsize=8)
    return found


def _alike_beside_each_other(unit_NM: np.ndarray) -> np.ndarray:
    """An order of the slots: around the circle of their first two principal components."""
    left_NN, *_ = np.linalg.svd(unit_NM - unit_NM.mean(0), full_matrices=False)
    return np.argsort(np.arctan2(left_NN[:, min(1, left_NN.shape[1] - 1)], left_NN[:, 0]))


def draw_survival(figure: Any, survival: Survival) -> list:
    """Accuracy by age, with 95% intervals."""
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


def draw_people(figure: Any, taken_LNP: np.ndarray, weight_LSN: np.ndarray) -> list:
    """Attention of slots to the statements about each person. weight_LSN: selects the slots to show."""
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


def draw_facts(figure: Any, answers: Answers) -> list:
    """Change of the slots, and attention when memory is written: facts against background."""
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
