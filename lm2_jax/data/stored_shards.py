"""Prepared shards in an object store: whole ones in a local cache of a stated size, and records one by one.

Documents are read in a shuffled order, so that every shard is wanted from the first window on. A thread copies shards
into the cache, as many as it may hold, one after the other; a document of a shard that is not there (yet) is read from
the store by itself, and the documents of a window are asked for together. So the first window needs no whole shard,
and what fits the cache crosses the network about once, however many epochs and restarts there are.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm2_jax.common.local_copies import cache_directory, download
from lm2_jax.common.storage import StorePath, read_ranges
from lm2_jax.data import shard_layout

_LONGEST_PAUSE = 600.0  # seconds between writings to a file; the network is waited for two minutes


class StoredShard(NamedTuple):
    """A shard's file in a store.

    Attributes:
      path: of the file.
      size: its bytes.
      digest: its SHA-256, by which it is known in the cache.
      ends: see `shard_layout.chunk_ends`.
    """

    path: StorePath
    size: int
    digest: str
    ends: np.ndarray

    @property
    def file(self) -> str:
        """Its name in the cache."""
        return f"{self.digest}.arrayrecord"


class StoredShards:
    """The shards of a source that are in a store, by their numbers in the source.

    Args:
      shards: those in a store; others are not in it.
      cache_bytes: the most that the cache of this machine may hold; 0: nothing is kept.
    """

    def __init__(self, shards: dict[int, StoredShard], cache_bytes: int) -> None:
        self._shards = shards
        self._here: dict[int, Path] = {}
        wanted = _claim(self, cache_bytes)
        if wanted:
            over = threading.Event()
            weakref.finalize(self, over.set)
            arguments = wanted, cache_bytes, self._here, over
            threading.Thread(target=_fill_cache, args=arguments, name="shard cache", daemon=True).start()

    def local(self, number: int) -> Path | None:
        """The local copy of a shard; None while there is none."""
        file = self._here.get(number)
        return file if file is not None and file.exists() else None  # another process may have made room

    def make_local(self, number: int) -> Path:
        """The local copy of a shard, made now if there is none. Raises OSError if it cannot be read."""
        file = self.local(number)
        if file is None:
            file = self._here[number] = _copy(self._shards[number])
        return file

    def read(self, records: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Reads records from the store, (shard, record, bytes of it) each, a request each, many at a time.

        Raises OSError if they cannot be read.
        """
        spans = [shard_layout.span(int(self._shards[number].ends[at]), size) for number, at, size in records]
        asked = [(self._shards[number].path, *span) for (number, *_), span in zip(records, spans, strict=True)]
        found = read_ranges(asked)
        return [shard_layout.record(data, start) for data, (start, _) in zip(found, spans, strict=True)]

    def __contains__(self, number: int) -> bool:
        return number in self._shards


_LOCK = threading.Lock()
_CLAIMS: dict[int, dict[str, int]] = {}  # of the sources of this process: bytes of the files that each wants to keep


def _claim(source: StoredShards, cache_bytes: int) -> dict[int, StoredShard]:
    """The shards of a source that go into the cache: as many as fit beside those of this process's other sources."""
    wanted: dict[int, StoredShard] = {}
    with _LOCK:
        claimed = _claimed()
        left = cache_bytes - sum(claimed.values())
        for number, shard in source._shards.items():
            if shard.file in claimed or shard.size <= left:
                left -= 0 if shard.file in claimed else shard.size
                wanted[number] = shard
        _CLAIMS[id(source)] = {shard.file: shard.size for shard in wanted.values()}
    weakref.finalize(source, _CLAIMS.pop, id(source), None)
    return wanted


def _claimed() -> dict[str, int]:
    return {file: size for files in list(_CLAIMS.values()) for file, size in files.items()}


def _fill_cache(wanted: dict[int, StoredShard], cache_bytes: int, here: dict[int, Path], over: threading.Event) -> None:
    """Copies shards until all are here. One that cannot be copied is left to those who read its documents."""
    _make_room(cache_bytes)
    for number, shard in wanted.items():
        if over.is_set():
            return
        with contextlib.suppress(OSError):
            here[number] = _copy(shard)


def _copy(shard: StoredShard) -> Path:
    file = _directory() / shard.file
    if file.exists() and file.stat().st_size == shard.size:
        os.utime(file)
        return file
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        download(shard.path, shard.size, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def _make_room(cache_bytes: int) -> None:
    """Removes shards of other data, those first that were wanted longest ago, until all that is claimed fits."""
    claimed = _claimed()
    room = cache_bytes - sum(claimed.values())
    others = [file for file in _directory().iterdir() if file.name not in claimed and not _is_growing(file)]
    for file in sorted(others, key=_last_wanted, reverse=True):
        with contextlib.suppress(OSError):  # another process may remove it too
            size = file.stat().st_size
            if size <= room:
                room -= size
            else:
                file.unlink()


def _is_growing(file: Path) -> bool:
    """True if another thread or process is copying a shard to it; a killed one's has not changed for long."""
    return file.name.startswith(".") and time.time() - _last_wanted(file) < _LONGEST_PAUSE


def _directory() -> Path:
    directory = cache_directory() / "shards"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _last_wanted(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
