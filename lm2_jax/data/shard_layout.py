"""Places of records in the ArrayRecord files that `prepared.py` writes: one record a chunk, nothing compressed.

Such a file follows from the sizes of its records alone, so that one of them can be read by itself, with one request. By
Riegeli's format, which ArrayRecord's files have, a file is blocks of 64 KiB that begin with a header of 24 bytes;
between these are chunks without gaps. The first chunk is a signature of 40 bytes; that of a record is a header of 40
bytes, the kind of compression (a byte), the size of the list of sizes (a byte), the record's size (a varint), and the
record. https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

from __future__ import annotations

import numpy as np

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_SIGNATURE = 40
_CHUNK_HEADER = 42  # bytes before the varint


def chunk_ends(sizes: np.ndarray) -> np.ndarray:
    """The end of each record of int64 [n] bytes, counted without the headers of blocks; int64 [n]."""
    sizes = sizes.astype(np.int64)
    varints = 1 + sum((sizes >> (7 * more) > 0).astype(np.int64) for more in range(1, 6))
    return _SIGNATURE + np.cumsum(_CHUNK_HEADER + varints + sizes)


def span(end: int, size: int) -> tuple[int, int]:
    """First byte of the file, and the one after the last, between which a record lies that ends at `end`."""
    return _in_file(end - size), _in_file(end - 1) + 1


def record(data: bytes, start: int) -> bytes:
    """The record in bytes that were read from `start` of the file on, as `span` says."""
    parts, at = [], 0
    while at < len(data):
        in_block = (start + at) % _BLOCK
        if in_block < _BLOCK_HEADER:
            at += _BLOCK_HEADER - in_block
        length = _BLOCK - (start + at) % _BLOCK
        parts.append(data[at : at + length])
        at += length
    return b"".join(parts)


def _in_file(position: int) -> int:
    """Counts the headers of blocks too."""
    return position + _BLOCK_HEADER * (position // (_BLOCK - _BLOCK_HEADER) + 1)
