"""Warnings about a run that is going wrong: a loss that jumps, a bank that grows without bound, a memory without use.

Each warning says what to change. A lasting condition is reported once; a jump of the loss each time.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

_WARM_UP = 20  # records before the gates are judged: they open while the first facts are learnt
_PATIENCE = 5  # records in a row, so that one odd window does not count
_GROWTH = 30.0  # times the norm that slots began with
_HISTORY = 50  # records that a loss is compared with
_JUMP = 2.0  # times their median, plus one nat

# A gate that stays below a level is closed: (gate, level, what it means, what to change)
_CLOSED = (
    (
        "gate_output",
        0.01,
        "memory is hardly read",
        "raise optim.learning_rate, or train on texts (data.source, windows of more segments) that need what was read "
        "before",
    ),
    (
        "gate_input",
        0.001,
        "memory is hardly written",
        "with kind lm2 lower memory.forget_bias (gates convex), or raise memory.input_bias (independent)",
    ),
    ("gate_forget", 0.01, "memory keeps nothing", "with kind lm2 raise memory.forget_bias"),
)


class Health:
    """Watches the records of one run."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=_HISTORY)
        self._stage: int | None = None  # of the losses
        self._first_norms: list[float] = []
        self._in_a_row: collections.Counter[str] = collections.Counter()
        self._reported: set[str] = set()
        self._records = 0

    def look(self, record: Mapping[str, Any]) -> Iterator[str]:
        """Warnings about a record of metrics.jsonl; records come in the order of their steps."""
        self._records += 1
        yield from self._jump(record)
        yield from self._growth(record)
        if self._records > _WARM_UP:
            for gate, level, meaning, remedy in _CLOSED:
                if gate in record and self._lasts(gate, record[gate] < level):
                    yield (
                        f"step {record['step']}: {meaning}: {gate} was below {level} for {_PATIENCE} records in a row "
                        f"(now {record[gate]:.2g}); {remedy}"
                    )

    def _jump(self, record: Mapping[str, Any]) -> Iterator[str]:
        if record.get("stage") != self._stage:  # longer windows may be harder
            self._losses.clear()
            self._stage = record.get("stage")
        loss, usual = record["loss"], statistics.median(self._losses) if len(self._losses) == _HISTORY else None
        if not math.isfinite(loss):  # such steps are skipped, counted and limited
            return
        self._losses.append(loss)
        if usual is not None and loss > _JUMP * usual + 1:
            self._losses.clear()  # the next jump is one from here
            yield (
                f"step {record['step']}: the loss jumped to {loss:.3g}, from a median of {usual:.3g} over {_HISTORY} "
                "records; if it does not come back, start another run with a lower optim.learning_rate"
            )

    def _growth(self, record: Mapping[str, Any]) -> Iterator[str]:
        norm = record.get("memory_norm_max")
        if norm is None:
            return
        if len(self._first_norms) < _PATIENCE:
            self._first_norms.append(norm)
            return
        usual = statistics.median(self._first_norms)
        if self._lasts("growth", norm > _GROWTH * max(usual, 1.0)):  # 1: lm2's slots at first; others begin empty
            yield (
                f"step {record['step']}: the memory grows without bound: its largest slot has norm {norm:.3g}, and had "
                f"{usual:.3g} at first; lower optim.learning_rate, or set memory.gates to convex, which bounds lm2's"
            )

    def _lasts(self, what: str, here: bool) -> bool:
        """True if a condition has lasted long enough, and was not reported before."""
        self._in_a_row[what] = self._in_a_row[what] + 1 if here else 0
        if self._in_a_row[what] < _PATIENCE or what in self._reported:
            return False
        self._reported.add(what)
        return True
