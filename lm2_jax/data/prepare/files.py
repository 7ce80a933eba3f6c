"""Files to prepare: text, JSON lines (both may be compressed) and token shards of the official code."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.data.documents import BinSource
from lm2_jax.data.prepare.chunks import Chunk, chunked, reading
from lm2_jax.data.texts import bom_size, check_line, cut_text, decode_text, json_text, read_lines


@dataclasses.dataclass(frozen=True)
class FileInput:
    """A file to prepare, told apart by name, size, time and checksum."""

    path: Path

    @property
    def name(self) -> str:
        """See `Input`."""
        return str(self.path)

    @property
    def size(self) -> int:
        """See `Input`."""
        return self.path.stat().st_size

    def state(self) -> dict[str, Any]:
        """See `Input`."""
        return {"name": self.name, "bytes": self.size, "modified": self.path.stat().st_mtime_ns}

    def identity(self) -> dict[str, Any]:
        """See `Input`."""
        with self.path.open("rb") as file:
            return {"name": self.name, "bytes": self.size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@dataclasses.dataclass(frozen=True)
class TextInput(FileInput):
    """A UTF-8 text file, which `separator` (a regular expression) cuts into documents."""

    separator: str | None

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        with _unpacked(self.path) as (file, _), reading(self.name):
            data = file.read()
        yield Chunk(1, (data,), self.size)

    def parse(self, chunk: Chunk) -> Iterator[str | UserError]:
        """See `Input`."""
        (data,) = chunk.raw
        start = bom_size(data)
        try:
            yield from cut_text(decode_text(data[start:], self.path, start), self.separator)
        except UserError as error:
            yield error


@dataclasses.dataclass(frozen=True)
class JsonLinesInput(FileInput):
    """JSON lines: objects with their text in `field`."""

    field: str

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        with _unpacked(self.path) as (file, raw_file):
            yield from chunked(read_lines(file), raw_file.tell, f"{self.name}: line")

    def parse(self, chunk: Chunk) -> Iterator[str | UserError]:
        """See `Input`."""
        for number, line in enumerate(chunk.raw, chunk.first):
            where = f"{self.name}: line {number}"
            try:
                check_line(line, where)
                if number == 1:
                    line = line[bom_size(line) :]
                if line.strip():
                    yield json_text(decode_text(line, where), where, self.field)
            except UserError as error:
                yield error


@dataclasses.dataclass(frozen=True)
class BinInput(FileInput):
    """A token shard of the official code; see `documents.BinSource`."""

    vocab_size: int
    bos_id: int

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        if self.size == BinSource.HEADER_BYTES:
            return  # no token
        source = BinSource([self.path], self.vocab_size, self.bos_id, key="--input")
        documents = (source[index].tokens.astype("<u4").tobytes() for index in range(len(source)))
        yield from chunked(documents, None, f"{self.name}: document")

    def parse(self, chunk: Chunk) -> Iterator[np.ndarray]:
        """See `Input`."""
        for data in chunk.raw:
            yield np.frombuffer(data, "<u4").astype(np.int32)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file, unpacked if it ends in .gz or .zst; and the file as it is, whose `tell` shows progress."""
    with reading(str(path)):
        file = path.open("rb")
    with file:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=file), file
        elif path.suffix == ".zst":
            pa = importlib.import_module("pyarrow")
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"), 1 << 16), file
        else:
            yield file, file
