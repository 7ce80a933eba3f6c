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
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm2_jax.common.local_copies import cache_directory, download
from lm2_jax.common.storage import StorePath, read_ranges
from lm2_jax.data import shard_layout


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


class StoredShards:
    """The shards of a source that are in a store, by their numbers in the source.

    Args:
      shards: those in a store; others are not in it.
      cache_bytes: the most that the cache of this machine may hold; 0: nothing is kept.
    """

    def __init__(self, shards: dict[int, StoredShard], cache_bytes: int) -> None:
        self._shards = shards
        self._here: dict[int, Path] = {}
        self._over = threading.Event()
        wanted, left = [], cache_bytes
        for number, shard in shards.items():
            if shard.size <= left:
                left -= shard.size
                wanted.append(number)
        if wanted:
            weakref.finalize(self, self._over.set)
            arguments = [(number, shards[number]) for number in wanted], cache_bytes, self._here, self._over
            threading.Thread(target=_fill_cache, args=arguments, name="shard cache", daemon=True).start()

    def local(self, number: int) -> Path | None:
        """The local copy of a shard; None while there is none."""
        return self._here.get(number)

    def make_local(self, number: int) -> Path:
        """The local copy of a shard, made now if there is none. Raises OSError if it cannot be read."""
        if number not in self._here:
            self._here[number] = _copy(self._shards[number], _directory())
        return self._here[number]

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


def _directory() -> Path:
    directory = cache_directory() / "shards"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _fill_cache(
    wanted: Sequence[tuple[int, StoredShard]], cache_bytes: int, here: dict[int, Path], over: threading.Event
) -> None:
    """Copies shards until all are here. One that cannot be copied is left to those who read its documents."""
    directory = _directory()
    _make_room(directory, {f"{shard.digest}.arrayrecord" for _, shard in wanted}, wanted, cache_bytes)
    for number, shard in wanted:
        if over.is_set():
            return
        with contextlib.suppress(OSError):
            here[number] = _copy(shard, directory)


def _copy(shard: StoredShard, directory: Path) -> Path:
    file = directory / f"{shard.digest}.arrayrecord"
    if file.exists() and file.stat().st_size == shard.size:
        os.utime(file)
        return file
    partial = directory / f".{shard.digest}.{os.getpid()}.{threading.get_ident()}"
    try:
        download(shard.path, shard.size, partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def _make_room(directory: Path, keep: set[str], wanted: Sequence[tuple[int, StoredShard]], cache_bytes: int) -> None:
    """Removes shards of other data, those first that were wanted longest ago, until all that is wanted fits."""
    others = [file for file in directory.iterdir() if file.name not in keep]
    room = cache_bytes - sum(shard.size for _, shard in wanted)
    for file in sorted(others, key=_age, reverse=True):
        with contextlib.suppress(OSError):  # another process may remove it too
            size = file.stat().st_size
            if size <= room:
                room -= size
            else:
                file.unlink()


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
