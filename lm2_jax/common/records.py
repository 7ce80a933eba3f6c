"""metrics.jsonl: one JSON object a step of a run."""

from __future__ import annotations

import json
from typing import Any

from lm2_jax.common.journal import Journal
from lm2_jax.common.storage import AnyPath

Record = dict[str, Any]


def drawable(record: Record) -> dict[str, int | float]:
    """The values of a record that can be drawn, against its step and time."""
    return {k: v for k, v in record.items() if k not in ("step", "time") and isinstance(v, int | float)}


def drop_records_after(path: AnyPath, step: int) -> None:
    """Cuts metrics.jsonl back to `step`, where a resumed run continues; a half-written last line goes too."""
    journal = Journal(path)
    if not journal.exists():
        return
    kept = []
    for line in journal.read().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    journal.rewrite("".join(kept))


def read_records(path: AnyPath) -> list[Record]:
    """Records of a metrics.jsonl; a last line that is still being written is left out.

    Raises OSError, or ValueError for another kind of file.
    """
    text = Journal(path).read()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
