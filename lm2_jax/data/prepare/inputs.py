"""Inputs to prepare, opened by name: text, JSON lines, tables, official token shards and hub data sets."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import content_digest, expand_paths, sha256_of
from lm2_jax.common.storage import AnyPath
from lm2_jax.data.documents import BinSource
from lm2_jax.data.prepare.chunks import Chunk, Input, Unreachable, arrow_error, chunked, reading, require
from lm2_jax.data.texts import (
    bom_size,
    check_line,
    cut_text,
    decode_text,
    is_text_ending,
    json_text,
    read_lines,
    table_texts,
)

_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?")
_SAMPLED_BLOCKS = 16  # MiB that show whether an input has changed: there may be thousands of inputs
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".bin", ".gz", ".zst")


def open_inputs(
    names: Sequence[str],
    *,
    field: str,
    separator: str | None,
    split: str,
    vocab_size: int,
    bos_id: int | None,
) -> list[Input]:
    """Opens inputs by name: files and globs, sorted, then hub ids: `owner/name`, optionally with `@revision` and
    `:config`.

    Endings tell how a file is read: .jsonl, .ndjson, .json (lines of objects), .csv, .tsv (with a header line),
    .parquet, .bin (the official layout); .txt and the like are text. .gz or .zst may follow, except after .parquet and
    .bin.

    Args:
      field: the key or column that holds the text.
      separator: of text files, as in `documents.TextSource`.
      split: of hub data sets.
      vocab_size: ids of .bin files must be below it.
      bos_id: the id that documents of .bin files begin with.

    Raises UserError for a name that matches nothing, for an ending that is none of these, and if a package that an
    input needs is not installed.
    """
    hub = [name for name in names if _is_hub_id(name)]
    patterns = [name for name in names if name not in hub]
    inputs: list[Input] = []
    for path in expand_paths(patterns, "--input") if patterns else ():
        suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
        packed = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else None
        kind = suffixes[-1] if suffixes else ""
        if packed and kind in (".parquet", ".bin"):
            raise UserError(f"{path}: unpack it first; {kind} files are read in place")
        if packed == ".zst":
            require("pyarrow", f"{path}: zstd")
        if kind in (".jsonl", ".ndjson", ".json"):
            inputs.append(JsonLinesInput(path, field))
        elif kind in _DELIMITERS:
            inputs.append(DelimitedInput(path, field, _DELIMITERS[kind]))
        elif kind == ".parquet":
            require("pyarrow.parquet", f"{path}: parquet")
            inputs.append(ParquetInput(path, field))
        elif kind == ".bin":
            if bos_id is None:
                raise UserError(f"{path}: documents begin with a begin token, which --tokenizer does not have")
            inputs.append(BinInput(path, vocab_size, bos_id))
        elif is_text_ending(kind):
            inputs.append(TextInput(path, separator))
        else:
            raise UserError(
                f"{path}: files that end in {kind} are not read; give text (.txt), .jsonl, .csv, .tsv, .parquet or "
                ".bin, or name it .txt if it is plain text"
            )
    return inputs + [_open_hub(name, split, field) for name in hub]


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists() and Path(name).suffix.lower() not in _ENDINGS


# --- Files -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FileInput:
    """A file to prepare, told apart by name, size, time and a checksum of samples, once prepared of all its bytes."""

    path: AnyPath

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
        stat = self.path.stat()
        digest = content_digest(self.path, _SAMPLED_BLOCKS)
        return {"name": self.name, "bytes": stat.st_size, "modified": stat.st_mtime_ns, "content": digest}

    def identity(self) -> dict[str, Any]:
        """See `Input`."""
        return {"name": self.name, "bytes": self.size, "sha256": sha256_of(self.path)}


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
def _unpacked(path: AnyPath) -> Iterator[tuple[BinaryIO, BinaryIO]]:
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


# --- Tables with texts in one column ---------------------------------------------------------------------------------


class _Rows:
    """Parsing of the rows of a table with texts in one column; None stands for a row without one."""

    @property
    def _missing(self) -> str:
        return f"{self.field!r} is null; expected a string"

    def parse(self, chunk: Chunk) -> Iterator[str | UserError]:
        """See `Input`."""
        for number, value in enumerate(chunk.raw, chunk.first):
            where = f"{self.name}: row {number}"
            try:
                if value is None:
                    raise UserError(f"{where}: {self._missing}")
                yield value if isinstance(value, str) else decode_text(value, where)
            except UserError as error:
                yield error


@dataclasses.dataclass(frozen=True)
class DelimitedInput(_Rows, FileInput):
    """A table of lines (CSV or TSV) below a header line, with texts in the column `field`."""

    field: str
    delimiter: str
    _missing = "has more or fewer columns than the header; a text that contains the delimiter needs quotes"

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        with _unpacked(self.path) as (file, raw_file):
            texts = table_texts(file, self.field, self.delimiter, self.name)
            yield from chunked(texts, raw_file.tell, f"{self.name}: row")


@dataclasses.dataclass(frozen=True)
class ParquetInput(_Rows, FileInput):
    """A parquet table with texts in the column `field`."""

    field: str

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        pa = importlib.import_module("pyarrow")
        with reading(self.name), self.path.open("rb") as file:
            table = importlib.import_module("pyarrow.parquet").ParquetFile(file)
            schema = table.schema_arrow
            if self.field not in schema.names:
                raise UserError(f"{self.name}: has no column {self.field!r}; its columns are {', '.join(schema.names)}")
            kind = schema.field(self.field).type
            values = kind.value_type if pa.types.is_dictionary(kind) else kind
            if str(values) not in ("string", "large_string", "string_view"):
                raise UserError(f"{self.name}: column {self.field!r} holds {kind}; expected strings")
            yield from chunked(self._values(pa, table), file.tell, f"{self.name}: row")

    def _values(self, pa: ModuleType, table: Any) -> Iterator[bytes | None]:
        for batch in table.iter_batches(batch_size=256, columns=[self.field]):
            yield from (batch.column(0).cast(pa.large_binary()).to_pylist())  # bytes, decoded one by one


@dataclasses.dataclass(frozen=True)
class HubInput(_Rows):
    """A data set of the Hugging Face hub, streamed, with texts in the column `field`."""

    repository: str
    config: str | None
    split: str
    field: str
    revision: str | None

    size = None

    @property
    def name(self) -> str:
        """`owner/name:config`."""
        return f"{self.repository}:{self.config}" if self.config else self.repository

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        datasets = importlib.import_module("datasets")
        try:
            rows = datasets.load_dataset(
                self.repository, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # of any of a dozen libraries
            raise Unreachable(f"{self.name}: cannot be opened ({_first_line(error)})") from None
        yield from chunked(self._values(rows), None, f"{self.name}: row")

    def _values(self, rows: Iterable[dict[str, Any]]) -> Iterator[str | None]:
        for number, row in enumerate(self._reachable(rows), 1):
            if self.field not in row:
                raise UserError(f"{self.name}: has no column {self.field!r}; its columns are {', '.join(row)}")
            value = row[self.field]
            if not isinstance(value, str | None):
                kind = type(value).__name__
                raise UserError(f"{self.name}: row {number}: {self.field!r} holds {kind}; expected strings")
            yield value

    def _reachable(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the rows. Raises Unreachable for faults of the network, the hub or a full cache."""
        try:
            yield from rows
        except Exception as error:  # of any of a dozen libraries
            damaged = isinstance(error, (ValueError, arrow_error())) and not isinstance(error, OSError)
            if damaged or isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
                raise
            raise Unreachable(
                f"{self.name}: the hub sends no more rows ({_first_line(error)}); the same command resumes (if it "
                "always ends here, the hub's data is damaged)"
            ) from None

    def state(self) -> dict[str, Any]:
        """See `Input`."""
        return self.identity()

    def identity(self) -> dict[str, Any]:
        """See `Input`."""
        return {"name": self.name, "split": self.split, "revision": self.revision}


def _open_hub(name: str, split: str, field: str) -> HubInput:
    """Opens a data set at the named or newest revision, pinned to its commit."""
    require("datasets", f"{name}: a data set of the Hugging Face hub")
    repository, revision, config = _HUB_ID.fullmatch(name).group("repository", "revision", "config")
    try:
        hub = importlib.import_module("huggingface_hub").HfApi()
        commit = hub.dataset_info(repository, revision=revision).sha
    except Exception as error:  # of any of a dozen libraries
        raise UserError(
            f"--input: {name} is no file, and no data set that the Hugging Face hub shows ({_first_line(error)})"
        ) from None
    return HubInput(repository, config, split, field, commit)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
