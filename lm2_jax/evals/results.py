"""What an evaluation has finished, kept as JSON lines beside its output, so that an interrupted one goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import write_atomically

Record = dict[str, Any]


class ResultLog:
    """Records by key. The file's first line says what they are of; lines are whole or cut away.

    Args:
      path: the file; None keeps records in memory alone.
      of: all that the records depend on (JSON).
      key: the entries of a record that tell it from others.

    Raises UserError if the file holds records of something else, or cannot be read or written.
    """

    def __init__(self, path: Path | None, of: Record, key: Sequence[str]) -> None:
        self._path, self._key = path, tuple(key)
        self._records: dict[tuple, Record] = {}
        if path is None:
            return
        of = json.loads(json.dumps(of))
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1] or json.dumps(of) + "\n"  # a killed run may leave half a line
            head, *records = map(json.loads, whole.splitlines())
            self._records = {self._key_of(record): record for record in records}
            differences = [name for name in of if head.get(name) != of[name]]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: holds no finished samples ({error}); remove it, or give another --output"
            ) from None
        if differences:
            name = differences[0]
            raise UserError(
                f"{path}: holds samples of another evaluation ({name}: {head.get(name)!r} there, {of[name]!r} now); "
                "remove it to begin again, or give another --output"
            )
        if whole != text:
            write_atomically(path, whole)

    def __contains__(self, key: tuple) -> bool:
        return key in self._records

    def __getitem__(self, key: tuple) -> Record:
        return self._records[key]

    def add(self, records: Iterable[Record]) -> None:
        """Keeps records, durably."""
        records = list(records)
        self._records |= {self._key_of(record): record for record in records}
        if self._path is not None and records:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())

    def _key_of(self, record: Record) -> tuple:
        return tuple(record[name] for name in self._key)


def finished_path(output: Path | None) -> Path | None:
    """Where the records of an evaluation stand: beside its output."""
    return None if output is None else output.with_suffix(".finished.jsonl")
