"""Measures programs in turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from lm2_jax.compiled.comparisons import Comparison, Program
from lm2_jax.model.sizes import memory_size, parameters

LEAST_SECONDS = 0.2  # a turn repeats its program for about this long


def measure(comparison: Comparison, rounds: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of a run of every variant (least, median and largest of `rounds` turns), and rates derived from them."""
    programs, repeats = {}, {}
    for name in comparison.variants:
        log(f"compiling: {name}")
        programs[name] = comparison.program(name)
        programs[name].run(1)
        repeats[name] = max(1, round(LEAST_SECONDS / max(_seconds(programs[name], 1), 1e-6)))
    turns: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        for name, program in programs.items():
            turns[name].append(_seconds(program, repeats[name]))
    per_token = {name: np.array(turns[name]) / program.tokens for name, program in programs.items()}
    first, rows = next(iter(per_token.values())), []
    for name, program in programs.items():
        ratios = per_token[name] / first  # of the same round
        rows.append(
            {
                "name": name,
                "parameters": parameters(program.config),
                "memory_size": memory_size(program.config),
                "tokens": program.tokens,
                "seconds": [min(turns[name]), statistics.median(turns[name]), max(turns[name])],
                "tokens_per_second": float(1 / np.median(per_token[name])),
                "time_per_token_ratio": float(np.median(ratios)),
                "ratio_range": [float(min(ratios)), float(max(ratios))],
            }
        )
    return rows


def _seconds(program: Program, times: int) -> float:
    began = time.perf_counter()
    program.run(times)
    return (time.perf_counter() - began) / times


def table_of(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Medians for people to read, with the time a token as a multiple of the first row's."""
    table = Table(title=comparison.title, title_justify="left")
    for header in ("", "parameters", "tokens", "ms", "tokens/s", "time a token", "range"):
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        low, high = row["ratio_range"]
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds'][1] * 1e3:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['time_per_token_ratio']:.2f}",
            f"{low:.2f} - {high:.2f}",
        )
    return table
