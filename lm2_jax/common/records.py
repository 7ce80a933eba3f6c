"""metrics.jsonl: one JSON object a step of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm2_jax.common.files import write_atomically

Record = dict[str, Any]


def drawable(record: Record) -> dict[str, int | float]:
    """The values of a record that can be drawn, against its step and time."""
    return {k: v for k, v in record.items() if k not in ("step", "time") and isinstance(v, int | float)}


def drop_records_after(path: Path, step: int) -> None:
    """Cuts metrics.jsonl back to `step`, where a resumed run continues; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    write_atomically(path, "".join(kept))


def read_records(path: Path) -> list[Record]:
    """Records of a metrics.jsonl; a last line that is still being written is left out.

    Raises OSError, or ValueError for another kind of file.
    """
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
