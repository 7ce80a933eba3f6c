"""Journals: text that grows by appending. In an object store, where nothing can be appended to, it comes in parts.

    metrics.jsonl                          the text so far
    metrics.jsonl.parts/000000123456       what was appended after 123,456 bytes
    metrics.jsonl.parts/000000127890       and so on

A part counts if it begins where the one before it ends, so that text which was since put together, or cut back, is
never read twice.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from lm2_jax.common.files import write_atomically
from lm2_jax.common.storage import AnyPath, StorePath
from lm2_jax.common.trees import remove_tree

_READERS = 32  # parts that are read at a time


class Journal:
    """A text file to append to, by one process at a time. Methods raise OSError where it cannot be read or written."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self._pending: list[str] = []
        self._file: TextIO | None = None
        self._size: int | None = None  # of the text in a store, where it is known

    def __str__(self) -> str:
        return str(self.path)

    @property
    def _parts(self) -> AnyPath:
        return self.path.with_name(self.path.name + ".parts")

    def exists(self) -> bool:
        """True if there is text, perhaps none of it complete."""
        return self.path.exists() or (isinstance(self.path, StorePath) and self._parts.is_dir())

    def read(self) -> str:
        """The whole text. Raises FileNotFoundError if there is none."""
        return self._read_bytes().decode("utf-8")

    def _read_bytes(self) -> bytes:
        if isinstance(self.path, Path):
            return self.path.read_bytes()
        parts = self._parts.files()
        try:
            text = bytearray(self.path.read_bytes())
        except FileNotFoundError:
            if not parts:
                raise
            text = bytearray()
        with ThreadPoolExecutor(_READERS) as pool:
            for part, data in zip(parts, pool.map(lambda part: part.read_bytes(), parts), strict=True):
                if part.name.isdecimal() and int(part.name) == len(text):
                    text += data
        return bytes(text)

    def rewrite(self, text: str) -> None:
        """Replaces the whole text, completely or not at all."""
        self._close_file()
        write_atomically(self.path, text)
        if isinstance(self.path, StorePath):
            remove_tree(self._parts)
            self._size = len(text.encode())

    def write(self, text: str) -> None:
        """Appends text with the next `flush`."""
        self._pending.append(text)

    def flush(self) -> None:
        """Appends what was written, durably."""
        text, self._pending = "".join(self._pending), []
        if not text:
            return
        if isinstance(self.path, StorePath):
            if self._size is None:
                self._size = len(self._read_bytes()) if self.exists() else 0
            data = text.encode()
            (self._parts / f"{self._size:012}").write_bytes(data)
            self._size += len(data)
            return
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; makes one object of its parts, for people and other programs."""
        self._close_file()
        if isinstance(self.path, StorePath) and self._size is not None and self._parts.is_dir():
            self.rewrite(self.read())

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
