"""Writing prepared data: documents -> the two files of a shard."""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lm2_jax.common.files import sha256_of
from lm2_jax.common.storage import AnyPath, StorePath
from lm2_jax.data.documents import BinSource
from lm2_jax.data.prepared import Format, Shard, data_file, id_dtype, index_path

_UNCOMPRESSED = "group_size:1,uncompressed"  # a document can be read without its neighbours; see shard_layout.py


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Consecutive documents, tokenised.

    Attributes:
      tokens: int32 [sum of tokens], one document after the other.
      index: int32 [documents, 2], tokens of each and bytes of its text (-1: not known).
    """

    tokens: np.ndarray
    index: np.ndarray

    def documents(self) -> list[np.ndarray]:
        """The tokens of each document."""
        return np.split(self.tokens, np.cumsum(self.index[:-1, 0])) if len(self.index) else []


def write_shard(
    directory: AnyPath, scratch: Path, name: str, format: Format, encoded: Iterable[Encoded], vocab_size: int
) -> Shard:
    """Writes the documents as one shard; its files appear in `directory` once they are whole and on the disk.

    A shard without a document has no files.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    data, index_file = scratch / f"{name}.partial", scratch / f"{name}.index.partial"
    indices = [np.zeros((0, 2), np.int32)]

    def documents() -> Iterator[np.ndarray]:
        for consecutive in encoded:
            indices.append(consecutive.index)
            yield from consecutive.documents()

    _WRITERS[format](data, documents(), id_dtype(vocab_size))
    index = np.concatenate(indices)
    with index_file.open("wb") as file:
        np.save(file, index)
    shard = Shard(
        name=name,
        documents=len(index),
        tokens=int(index[:, 0].sum(dtype=np.int64)),
        text_bytes=int(index[:, 1].clip(0).sum(dtype=np.int64)),
        bytes=data.stat().st_size,
        sha256=sha256_of(data),
        index_sha256=sha256_of(index_file),
    )
    for file, target in ((data, data_file(directory, name, format)), (index_file, index_path(directory, name))):
        if len(index):
            _put(file, target)
        else:
            file.unlink()
    return shard


def _write_array_record(path: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> None:
    writer = ArrayRecordWriter(str(path), _UNCOMPRESSED)
    for tokens in documents:
        data = tokens.astype(dtype).tobytes()
        writer.write(struct.pack("<I", zlib.crc32(data)) + data)
    writer.close()


def _write_bin(path: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Writes the official layout; see `documents.BinSource`."""
    header, count = np.zeros(BinSource.HEADER_BYTES // 4, "<i4"), 0
    with path.open("wb") as file:
        file.write(header.tobytes())
        for tokens in documents:
            count += len(tokens)
            file.write(tokens.astype("<u4").tobytes())
        header[:3] = BinSource.MAGIC, BinSource.VERSION, count
        file.seek(0)
        file.write(header.tobytes())


_WRITERS = {"arrayrecord": _write_array_record, "bin": _write_bin}


def _put(file: Path, target: AnyPath) -> None:
    """Moves a file to where it is whole or not at all."""
    if isinstance(target, StorePath):
        target.upload(file)
        file.unlink()
        return
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.replace(target)
