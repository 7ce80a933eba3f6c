"""Prepared data: a directory of token shards with a manifest; how it is read and checked.

    manifest.json              inputs, tokenizer and settings it was made with; size and checksum of every shard
    00000-00000.arrayrecord    a record a document: CRC-32 (4 bytes), then its ids as little-endian uint16 or uint32
    00000-00000.index.npy      int32 [documents, 2]: tokens of each document, bytes of its text (-1: not known)
    tokenizer.json             a copy of the tokenizer's file (tokenizer.model for sentencepiece and llama3)

The manifest is written last, so a directory with one is whole; files that it does not name are never read. The order in
which lanes read documents follows from the index alone.
"""

from __future__ import annotations

import functools
import hashlib
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from array_record.python.array_record_module import ArrayRecordReader
from pydantic import BaseModel, ConfigDict, Field

from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.common.files import sha256_of
from lm2_jax.common.local_copies import local_copy
from lm2_jax.common.storage import AnyPath, StorePath, to_path
from lm2_jax.common.untrusted import read_limited, short_repr
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.documents import Document, DocumentSource
from lm2_jax.data.shard_layout import chunk_ends
from lm2_jax.data.stored_shards import StoredShard, StoredShards

Format = Literal["arrayrecord", "bin"]
MANIFEST = "manifest.json"
_REMEDY = "copy it again, or prepare again"
_VERSION = 1
_LARGEST_MANIFEST = 1 << 28  # bytes: of a million inputs or shards
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_INDICES = 32  # read from a store at a time
_OPEN_SHARDS = 512  # at a time, per source; many systems allow a process 1,024 open files


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class Shard(_Record):
    """One file of documents, and the index beside it."""

    name: str = Field(pattern="^[A-Za-z0-9_-]+$")  # without endings; never a way out of the directory
    documents: _Count
    tokens: _Count
    text_bytes: _Count
    bytes: _Count
    sha256: str
    index_sha256: str


class TokenizerRecord(_Record):
    """The tokenizer that made the ids."""

    kind: str
    file: Literal["tokenizer.json", "tokenizer.model"] | None  # its copy in the directory
    fingerprint: str
    vocab_size: int = Field(ge=1, le=1 << 32)


class Manifest(_Record):
    """Contents of a directory of prepared data. `settings`, `sources` and `problems` are for people to look up."""

    version: int
    format: Format
    tokenizer: TokenizerRecord
    documents: _Count
    tokens: _Count
    text_bytes: _Count
    empty: _Count  # documents of nothing but white space, left out
    skipped: _Count  # documents left out because something was wrong with them
    problems: tuple[str, ...]  # what it was, for the first of them
    settings: dict[str, Any]
    sources: tuple[dict[str, Any], ...]
    shards: tuple[Shard, ...] = Field(min_length=1)


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest type of two or four bytes that ids below `vocab_size` fit in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def read_manifest(directory: str | AnyPath, key: str = "data.path") -> Manifest:
    """Reads a directory's manifest. Raises UserError if it is missing, damaged, or of another version."""
    path = to_path(directory, key) / MANIFEST
    try:
        manifest = Manifest.model_validate_json(read_limited(path, _LARGEST_MANIFEST))
    except FileNotFoundError:
        raise UserError(
            f"{key}: {directory} has no {MANIFEST}; name a directory that lm2_jax.prepare_data has finished "
            "(called again, it resumes where it stopped)"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: is damaged ({f'{place}: ' if place else ''}{first['msg']}); {_REMEDY}") from None
    if empty := [shard.name for shard in manifest.shards if not shard.documents]:
        raise UserError(f"{path}: is damaged (shard {empty[0]} has no document); {_REMEDY}")
    if manifest.version != _VERSION:
        raise UserError(f"{path}: version {manifest.version}; this code reads version {_VERSION}, prepare again")
    return manifest


def make_manifest(**values: Any) -> str:
    """Makes a manifest as JSON text; its version and sums are filled in."""
    shards = values["shards"]
    sums = {name: sum(getattr(shard, name) for shard in shards) for name in ("documents", "tokens", "text_bytes")}
    return Manifest(version=_VERSION, **sums, **values).model_dump_json(indent=1) + "\n"


def read_index(directory: str | AnyPath, manifest: Manifest) -> np.ndarray:
    """Reads tokens and bytes of text of every document, int32 [documents, 2]; -1 where the bytes are not known.

    Raises UserError for an index that disagrees with the manifest.
    """
    paths = [index_path(to_path(directory), shard.name) for shard in manifest.shards]
    with ThreadPoolExecutor(_INDICES if isinstance(paths[0], StorePath) else 1) as pool:
        return np.concatenate(list(pool.map(_read_index, paths, manifest.shards)))


def _read_index(path: AnyPath, shard: Shard) -> np.ndarray:
    try:
        file = local_copy(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    header = io.BytesIO()
    layout = {"descr": "<i4", "fortran_order": False, "shape": (shard.documents, 2)}
    np.lib.format.write_array_header_1_0(header, layout)
    start, size = len(header.getvalue()), file.stat().st_size
    data = file.read_bytes() if size == start + 8 * shard.documents else b""
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(f"{path}: is damaged (its SHA-256 is not the manifest's); {_REMEDY}")
    index = np.frombuffer(data, "<i4", offset=start).reshape(-1, 2) if data.startswith(header.getvalue()) else None
    if index is None or (index[:, 0] < 0).any() or index[:, 0].sum(dtype=np.int64) != shard.tokens:
        raise UserError(f"{path}: is no index of {shard.documents} documents and {shard.tokens} tokens; {_REMEDY}")
    return index


def data_file(directory: AnyPath, name: str, format: Format) -> AnyPath:
    """The path of a shard's documents."""
    return directory / f"{name}.{format}"


def index_path(directory: AnyPath, name: str) -> AnyPath:
    """The path of a shard's index."""
    return directory / f"{name}.index.npy"


# --- Reading -------------------------------------------------------------------------------------------------------


class PreparedSource(DocumentSource):
    """The documents of directories of prepared data, in their order.

    Sizes and indices are checked at the start, a document's own checksum when it is read.

    Args:
      directories: written by lm2_jax.prepare_data.
      fingerprint: of the tokenizer that must have made the ids; None: any.
      key: the setting that `directories` come from, for messages.
      cache_bytes: of shards in a store, the most that are kept on this machine; see `stored_shards.py`.

    Attributes:
      lengths: int32 [documents], tokens of each.

    Raises UserError, with the problems of all directories, for manifests that are missing, damaged or made with
    another tokenizer, and for files that are missing, cut short or damaged.
    """

    def __init__(
        self,
        directories: Sequence[str | AnyPath],
        fingerprint: str | None = None,
        key: str = "data.path",
        cache_bytes: int = 0,
    ) -> None:
        self._arguments = (directories, fingerprint, key, cache_bytes)
        self._shards: list[tuple[AnyPath, Shard, np.dtype]] = []
        indices, problems = [], []
        for directory in directories:
            try:
                directory = to_path(directory, key)
                manifest = _check(directory, fingerprint, key)
                indices.append(read_index(directory, manifest))
            except UserError as error:
                problems.append(str(error))
                continue
            dtype = id_dtype(manifest.tokenizer.vocab_size)
            self._shards += [(data_file(directory, s.name, "arrayrecord"), s, dtype) for s in manifest.shards]
        if problems:
            raise UserError("\n".join(problems))
        self.lengths, self._text_bytes = np.concatenate(indices).T
        self._starts = np.cumsum([0, *(shard.documents for _, shard, _ in self._shards)])  # of each shard's documents
        self._reader = functools.lru_cache(_OPEN_SHARDS)(_open_reader)  # a cache per source: a file may be replaced
        self._stored = StoredShards(dict(self._in_store()), cache_bytes)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        """Reads a document. Raises UserError if it is damaged."""
        return self.get_many([index])[0]

    def get_many(self, indices: Sequence[int]) -> list[Document]:
        """Reads documents; those that only the store has are asked for together."""
        places = [self._place(index) for index in indices]
        remote = [n for n, (number, _) in enumerate(places) if self._is_remote(number)]
        if not remote:
            return [self._document(index, *place) for index, place in zip(indices, places, strict=True)]
        wanted = [(*places[n], self._record_bytes(indices[n], places[n][0])) for n in remote]
        try:
            found = dict(zip(remote, self._stored.read(wanted), strict=True))
        except OSError as error:
            raise TrainingFailed(f"{error.filename}: the documents cannot be read ({error.strerror})") from None
        return [self._document(indices[n], *place, found.get(n)) for n, place in enumerate(places)]

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a document's shard, and the document's number in it."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, int(index - self._starts[number])

    def _document(self, index: int, number: int, record: int, data: bytes | None = None) -> Document:
        """The document of a record, whose bytes are read, if they are not given. Raises UserError if it is damaged."""
        path, _, dtype = self._shards[number]
        length, text_bytes = int(self.lengths[index]), int(self._text_bytes[index])
        size = 4 + length * dtype.itemsize
        if data is None or not _is_sound(data, size):  # or written by another ArrayRecord
            data = self._read_locally(number, record)
            if not _is_sound(data, size):
                raise UserError(f"{path}: record {record} is damaged (its CRC-32 does not match); {_REMEDY}")
        tokens = np.frombuffer(data, dtype, offset=4).astype(np.int32)
        return Document(tokens, np.zeros(length, bool), None if text_bytes < 0 else text_bytes)

    def _read_locally(self, number: int, record: int) -> bytes:
        path = self._shards[number][0]
        try:
            file = self._stored.make_local(number) if number in self._stored else path
        except OSError as error:
            raise TrainingFailed(f"{path}: cannot be read ({error.strerror})") from None
        try:
            return self._reader(file).read([record])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0].split("; ")[0]
            raise UserError(f"{path}: record {record} is damaged ({reason}); {_REMEDY}") from None

    def _is_remote(self, number: int) -> bool:
        return number in self._stored and self._stored.local(number) is None

    def _record_bytes(self, index: int, number: int) -> int:
        return 4 + int(self.lengths[index]) * self._shards[number][2].itemsize

    def _in_store(self) -> Iterator[tuple[int, StoredShard]]:
        for number, (path, shard, dtype) in enumerate(self._shards):
            if isinstance(path, StorePath):
                lengths = self.lengths[self._starts[number] : self._starts[number + 1]]
                ends = chunk_ends(4 + lengths.astype(np.int64) * dtype.itemsize)
                yield number, StoredShard(path, shard.bytes, shard.sha256, ends)

    def __repr__(self) -> str:
        directories, *_ = self._arguments
        return f"PreparedSource({', '.join(map(str, directories))}, documents={len(self)})"

    def __reduce__(self) -> tuple:
        return type(self), self._arguments  # readers cannot be pickled


def _open_reader(path: Path) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), _RANDOM_ACCESS)


def _is_sound(record: bytes, size: int) -> bool:
    return len(record) == size and zlib.crc32(record[4:]) == struct.unpack_from("<I", record)[0]


def verify(directory: str | AnyPath, manifest: Manifest) -> None:
    """Reads every byte of every shard. Raises UserError naming all that disagree with the manifest."""
    directory = to_path(directory)
    problems, sizes = [], _sizes(directory)
    for shard in manifest.shards:
        file = data_file(directory, shard.name, manifest.format)
        if problem := _problem(directory, shard, manifest.format, sizes):
            problems.append(problem)
            continue
        if sha256_of(file) != shard.sha256:
            problems.append(f"{file}: is damaged (its SHA-256 is not the manifest's); {_REMEDY}")
        try:
            _read_index(index_path(directory, shard.name), shard)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _check(directory: AnyPath, fingerprint: str | None, key: str) -> Manifest:
    """Reads the manifest of a directory to train on, and checks tokenizer, format and files."""
    manifest = read_manifest(directory, key)
    made_with = manifest.tokenizer
    if fingerprint not in (None, made_with.fingerprint):
        right = f"path: {directory / made_with.file}" if made_with.file else ""
        raise UserError(
            f"{directory / MANIFEST}: made with another tokenizer ({made_with.kind}, {made_with.vocab_size} ids, "
            f"fingerprint {made_with.fingerprint}; this run's is {fingerprint}); set tokenizer to "
            f"{{kind: {made_with.kind}{', ' if right else ''}{right}}}, or prepare again"
        )
    if manifest.format != "arrayrecord":
        raise UserError(f"{key}: {directory} holds .bin shards; data.source bin reads them")
    sizes = _sizes(directory)
    problems = [problem for shard in manifest.shards if (problem := _problem(directory, shard, manifest.format, sizes))]
    if problems:
        raise UserError("\n".join(problems))
    return manifest


def _sizes(directory: AnyPath) -> dict[str, int]:
    """Bytes of the files of a directory, by name."""
    if isinstance(directory, StorePath):
        return directory.sizes()
    return {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}


def _problem(directory: AnyPath, shard: Shard, format: Format, sizes: dict[str, int]) -> str | None:
    """The first sign that a shard is not whole, without reading it; None if there is none."""
    data, index = data_file(directory, shard.name, format), index_path(directory, shard.name)
    if missing := [str(path) for path in (data, index) if path.name not in sizes]:
        return f"{', '.join(missing)}: missing, though the manifest names it; {_REMEDY}"
    if (size := sizes[data.name]) != shard.bytes:
        return f"{data}: {size} bytes, the manifest says {shard.bytes}; {_REMEDY}"
    return None


def tokenizer_of(directory: str | AnyPath, manifest: Manifest) -> TokenizerConfig:
    """The settings of a directory's tokenizer, whose file is the copy beside the manifest.

    Raises UserError for a manifest that names none.
    """
    made_with = manifest.tokenizer
    try:
        path = str(to_path(directory) / made_with.file) if made_with.file else None
        return TokenizerConfig(kind=made_with.kind, path=path)
    except pydantic.ValidationError:
        named = f"{short_repr(made_with.kind)} of {made_with.file or 'no file'}"
        raise UserError(f"{to_path(directory) / MANIFEST}: {named} is no tokenizer; {_REMEDY}") from None
