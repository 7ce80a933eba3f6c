"""What can be prepared: files and data sets of the Hugging Face hub, as streams of raw documents.

An input is read in order by one process, which is cheap, and handed out in chunks; parsing a chunk into texts, and all
that follows, is work for many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.data.documents import BinSource
from lm2_jax.data.paths import expand_paths
from lm2_jax.data.texts import bom_size, check_line, cut_text, decode_text, json_text, read_lines

Raw = bytes | str | None
CHUNK_BYTES = 1 << 20
_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?")
_ENDINGS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet", ".bin", ".gz", ".zst")


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive raw documents of an input.

    Attributes:
      first: number of the first of them, from 1.
      raw: lines of JSON lines, values of a column, token ids as little-endian uint32; a text file as a whole.
      read: bytes of the input that have been read so far (rows of a hub data set).
    """

    first: int
    raw: tuple[Raw, ...]
    read: int

    @property
    def size(self) -> int:
        """Bytes of the raw documents; characters where they are text already."""
        return sum(len(raw or b"") for raw in self.raw)


class Unreachable(UserError):
    """An input that cannot be read now, through no fault of its own: nothing of it is lost, so nothing is skipped."""


class Input(Protocol):
    """A stream of raw documents that can be pickled."""

    @property
    def name(self) -> str:
        """The file or hub data set, as messages and the manifest call it."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes of the file; None where nobody can tell."""
        ...

    def read(self) -> Iterator[Chunk]:
        """The raw documents in order; the same ones, in the same chunks, every time.

        Raises UserError, with the place, where the rest cannot be read; what comes before it is given first. Raises
        Unreachable where trying again may help.
        """
        ...

    def parse(self, chunk: Chunk) -> Iterator[str | np.ndarray | UserError]:
        """What the raw documents hold: texts, or ids (int32 [n]); or what is wrong with one, and where."""
        ...

    def state(self) -> dict[str, Any]:
        """What shows at a glance whether the input has changed."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the manifest keeps of the input: name, size and checksum, or a revision."""
        ...


def open_inputs(
    names: Sequence[str],
    *,
    field: str,
    separator: str | None,
    split: str,
    vocab_size: int,
    bos_id: int | None,
) -> list[Input]:
    """The inputs that names stand for: files and globs, sorted, then hub ids: `owner/name`, with `@revision` and
    `:config` if you like.

    Endings tell how a file is read: .jsonl, .ndjson, .json (lines of objects), .parquet, .bin (the official layout);
    all others are text. .gz or .zst may follow, but for .parquet and .bin.

    Args:
      field: the key or column that holds the text.
      separator: of text files, as in `documents.TextSource`.
      split: of hub data sets.
      vocab_size: ids of .bin files must be below it.
      bos_id: the id that documents of .bin files begin with.

    Raises UserError for what matches nothing, and where a package that reading needs is not installed.
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
            _library("pyarrow", f"{path}: zstd")
        if kind in (".jsonl", ".ndjson", ".json"):
            inputs.append(JsonLinesInput(path, field))
        elif kind == ".parquet":
            _library("pyarrow.parquet", f"{path}: parquet")
            inputs.append(ParquetInput(path, field))
        elif kind == ".bin":
            if bos_id is None:
                raise UserError(f"{path}: documents begin with a begin token, and --tokenizer names one without any")
            inputs.append(BinInput(path, vocab_size, bos_id))
        else:
            inputs.append(TextInput(path, separator))
    return inputs + [_open_hub(name, split, field) for name in hub]


# --- Files ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _File:
    """A file, by name, size, time and checksum."""

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
class TextInput(_File):
    """A UTF-8 text file, which `separator` (a regular expression) cuts into documents."""

    separator: str | None

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        with _unpacked(self.path) as (file, _), _readable(self.name):
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
class JsonLinesInput(_File):
    """JSON lines: objects with their text in `field`."""

    field: str

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        with _unpacked(self.path) as (file, raw_file):
            yield from _chunks(read_lines(file), raw_file.tell, f"{self.name}: line")

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


class _Rows:
    """Parsing of the rows of a table, whose texts stand in one column."""

    def parse(self, chunk: Chunk) -> Iterator[str | UserError]:
        """See `Input`."""
        for number, value in enumerate(chunk.raw, chunk.first):
            where = f"{self.name}: row {number}"
            try:
                if value is None:
                    raise UserError(f"{where}: {self.field!r} is null; expected a string")
                yield value if isinstance(value, str) else decode_text(value, where)
            except UserError as error:
                yield error


@dataclasses.dataclass(frozen=True)
class ParquetInput(_Rows, _File):
    """A parquet table with texts in the column `field`."""

    field: str

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        pa = importlib.import_module("pyarrow")
        with _readable(self.name), self.path.open("rb") as file:
            table = importlib.import_module("pyarrow.parquet").ParquetFile(file)
            columns = table.schema_arrow
            if self.field not in columns.names:
                raise UserError(
                    f"{self.name}: has no column {self.field!r}; its columns are {', '.join(columns.names)}"
                )
            kind = columns.field(self.field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{self.name}: column {self.field!r} holds {kind}; expected strings")
            yield from _chunks(self._values(pa, table), file.tell, f"{self.name}: row")

    def _values(self, pa: ModuleType, table: Any) -> Iterator[bytes | None]:
        for batch in table.iter_batches(batch_size=256, columns=[self.field]):
            yield from batch.column(0).cast(pa.large_binary()).to_pylist()  # bytes: decoded one by one


@dataclasses.dataclass(frozen=True)
class BinInput(_File):
    """A token shard of the official code; see `documents.BinSource`."""

    vocab_size: int
    bos_id: int

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        if self.size == BinSource.HEADER_BYTES:
            return  # no token
        source = BinSource([self.path], self.vocab_size, self.bos_id, key="--input")
        documents = (source[index].tokens.astype("<u4").tobytes() for index in range(len(source)))
        yield from _chunks(documents, None, f"{self.name}: document")

    def parse(self, chunk: Chunk) -> Iterator[np.ndarray]:
        """See `Input`."""
        for data in chunk.raw:
            yield np.frombuffer(data, "<u4").astype(np.int32)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's bytes, uncompressed if it ends in .gz or .zst; and the file itself, whose `tell` shows how far it is."""
    with _readable(str(path)):
        file = path.open("rb")
    with file:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=file), file
        elif path.suffix == ".zst":
            pa = importlib.import_module("pyarrow")
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"), 1 << 16), file
        else:
            yield file, file


def _chunks(values: Iterable[Raw], tell: Callable[[], int] | None, where: str) -> Iterator[Chunk]:
    """Values by the megabyte. An error in reading one comes after those before it, as a UserError with its number.

    tell: how many bytes of the input have been read; None: as many as the values have.
    """
    pending: list[Raw] = []
    first, size, before, failure = 1, 0, 0, None
    iterator = iter(values)
    while True:
        try:
            with _readable(f"{where} {first + len(pending)}"):
                pending.append(next(iterator))
        except StopIteration:
            break
        except UserError as error:
            failure = error
            break
        size += len(pending[-1] or b"")
        if size >= CHUNK_BYTES:
            before += size
            yield Chunk(first, tuple(pending), tell() if tell else before)
            first, pending, size = first + len(pending), [], 0
    if pending:
        yield Chunk(first, tuple(pending), tell() if tell else before + size)
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turns what damaged files make libraries raise into UserErrors."""
    try:
        yield
    except EOFError:
        raise UserError(f"{where}: the compressed file is cut short") from None
    except (zlib.error, OSError, ValueError, _arrow_error()) as error:
        text = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{where}: cannot be read ({text})") from None


def _arrow_error() -> type[Exception]:
    """The base of pyarrow's errors, where it is loaded."""
    try:
        return importlib.import_module("pyarrow").ArrowException
    except ImportError:
        return OSError


# --- The hub -------------------------------------------------------------------------------------------------------


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
        yield from _chunks(self._values(rows), None, f"{self.name}: row")

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
        """The rows. Raises Unreachable for what is not the data's fault: the network's, the hub's, a full cache's."""
        try:
            yield from rows
        except Exception as error:  # of any of a dozen libraries
            damaged = isinstance(error, (ValueError, _arrow_error())) and not isinstance(error, OSError)
            if damaged or isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
                raise
            raise Unreachable(
                f"{self.name}: the hub's rows come no more ({_first_line(error)}); the same command goes on (if it "
                "always ends so, what the hub has is damaged)"
            ) from None

    def state(self) -> dict[str, Any]:
        """See `Input`."""
        return self.identity()

    def identity(self) -> dict[str, Any]:
        """See `Input`."""
        return {"name": self.name, "split": self.split, "revision": self.revision}


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists() and Path(name).suffix.lower() not in _ENDINGS


def _open_hub(name: str, split: str, field: str) -> HubInput:
    """The data set at the revision that is named, or is newest now: as a commit, which will not move."""
    _library("datasets", f"{name}: a data set of the Hugging Face hub")
    repository, revision, config = _HUB_ID.fullmatch(name).group("repository", "revision", "config")
    try:
        hub = importlib.import_module("huggingface_hub").HfApi()
        commit = hub.dataset_info(repository, revision=revision).sha
    except Exception as error:  # of any of a dozen libraries
        raise UserError(
            f"--input: {name} is no file, and no data set that the Hugging Face hub shows ({_first_line(error)})"
        ) from None
    return HubInput(repository, config, split, field, commit)


def _library(module: str, what: str) -> None:
    """Raises UserError if a package that reading `what` needs is not installed."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {package}; pip install {package}") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
