"""Finished results, kept as JSON lines beside an evaluation's output, so that an interrupted one resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.journal import Journal
from lm2_jax.common.storage import AnyPath

Record = dict[str, Any]
_LATER_KEYS = ("contents",)  # of an identity, which files of earlier versions lack


class ResultLog:
    """Records by key. The file's first line identifies the evaluation; an incomplete last line is dropped.

    Args:
      path: the file; None keeps records in memory only.
      identity: everything that the records depend on (JSON).
      key: the entries that distinguish a record from the others.

    Raises UserError if the file holds records of another evaluation, or cannot be read or written.
    """

    def __init__(self, path: AnyPath | None, identity: Record, key: Sequence[str]) -> None:
        self._journal, self._key = None if path is None else Journal(path), tuple(key)
        self._records: dict[tuple, Record] = {}
        if path is None:
            return
        identity = json.loads(json.dumps(identity))
        try:
            text = self._journal.read() if self._journal.exists() else ""
            whole = text[: text.rfind("\n") + 1] or json.dumps(identity) + "\n"  # a killed run may leave half a line
            head, *records = map(json.loads, whole.splitlines())
            self._records = {self._key_of(record): record for record in records}
            known = [name for name in identity if name in head or name not in _LATER_KEYS]
            differences = [name for name in known if head.get(name) != identity[name]]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: holds no finished samples ({error}); remove it, or give another --output"
            ) from None
        if differences:
            name = differences[0]
            raise UserError(
                f"{path}: holds samples of another evaluation ({name}: {head.get(name)!r} there, "
                f"{identity[name]!r} now); remove it to start again, or give another --output"
            )
        if whole != text:
            self._journal.rewrite(whole)

    def __contains__(self, key: tuple) -> bool:
        return key in self._records

    def __getitem__(self, key: tuple) -> Record:
        return self._records[key]

    def add(self, records: Iterable[Record]) -> None:
        """Adds records, and writes them durably."""
        records = list(records)
        self._records |= {self._key_of(record): record for record in records}
        if self._journal is not None and records:
            self._journal.write("".join(json.dumps(record) + "\n" for record in records))
            self._journal.flush()

    def _key_of(self, record: Record) -> tuple:
        return tuple(record[name] for name in self._key)


def finished_path(output: AnyPath | None) -> AnyPath | None:
    """Path of an evaluation's finished records, beside its output."""
    return None if output is None else output.with_suffix(".finished.jsonl")
