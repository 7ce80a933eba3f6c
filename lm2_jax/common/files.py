"""Files that settings name, files that survive a kill, and directories that one process at a time may write to."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm2_jax.common.errors import UserError

_BLOCK = 1 << 20  # bytes that are read at a time


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that exists completely or not at all, even if the process is killed."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def content_digest(path: Path, blocks: int = 1024) -> str:
    """16 hex digits that change with a file's content, by which a changed file of the same size is recognised.

    Of a file of up to `blocks` MiB every byte counts; of a longer one so many MiB count, spread evenly from its first
    to its last, so that a file of any size takes a second or two.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    last = max(size - _BLOCK, 0)
    starts = range(0, size, _BLOCK)
    if len(starts) > blocks:
        starts = [last * number // (blocks - 1) for number in range(blocks)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    digest.update(str(size).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def lock_directory(directory: Path, complaint: str) -> Iterator[None]:
    """Locks a directory against other processes; the lock ends with the process, however that ends.

    Raises UserError with `complaint` if another process holds it.
    """
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(complaint) from None
        yield


def expand_paths(paths: Sequence[str | Path], key: str) -> list[Path]:
    """Lists the files that paths and globs (`**` matches any depth of directories) name, each once, sorted.

    Raises UserError, naming the setting `key`, for every path that leads to no file and for directories.
    """
    files: set[Path] = set()
    problems = []
    for path in map(str, paths):
        if Path(path).is_file():
            files.add(Path(path))
        elif Path(path).is_dir():
            problems.append(f"{key}: {path} is a directory; name files in it, for example {Path(path) / '*.txt'}")
        elif found := [file for file in map(Path, glob.iglob(path, recursive=True)) if file.is_file()]:
            files.update(found)
        else:
            problems.append(f"{key}: {path} " + ("matches no file" if glob.has_magic(path) else "does not exist"))
    if problems or not files:
        raise UserError("\n".join(problems) or f"{key}: no files given")
    return sorted(files)
