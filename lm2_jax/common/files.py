"""Files that settings name, files that survive a kill, and directories that one process at a time may write to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm2_jax.common import lease
from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath, StorePath, to_path

_BLOCK = 1 << 20  # bytes that are read at a time


def write_atomically(path: AnyPath, text: str) -> None:
    """Writes a file that exists completely or not at all, even if the process is killed."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: AnyPath, data: bytes) -> None:
    """Does what `write_atomically` does, with bytes."""
    if isinstance(path, StorePath):
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def content_digest(path: AnyPath, blocks: int = 1024) -> str:
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


def sha256_of(path: AnyPath) -> str:
    """The SHA-256 of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock_directory(directory: AnyPath, complaint: str) -> Iterator[None]:
    """Locks a directory against other processes; the lock ends with the process, however that ends.

    Where there are no locks, in a store and on some network file systems, a lease stands for it, which ends five
    minutes after a process that is killed. Raises UserError with `complaint` if another process holds it.
    """
    with contextlib.ExitStack() as cleanup:
        if isinstance(directory, StorePath) or not _lock(cleanup, directory / ".lock", complaint):
            cleanup.enter_context(lease.hold(directory, complaint))
        yield


def _lock(cleanup: contextlib.ExitStack, path: Path, complaint: str) -> bool:
    """Locks a file until `cleanup` ends; False if its file system has no locks."""
    file = cleanup.enter_context(path.open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(complaint) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def expand_paths(paths: Sequence[str | AnyPath], key: str) -> list[AnyPath]:
    """Lists the files that paths and globs (`**` matches any depth of directories) name, each once, sorted.

    Raises UserError, naming the setting `key`, for every path that leads to no file and for directories.
    """
    files: set[AnyPath] = set()
    problems = []
    for text in paths:
        try:
            path = to_path(text, key)
            if path.is_file():
                files.add(path)
            elif path.is_dir():
                problems.append(f"{key}: {path} is a directory; name files in it, for example {path / '*.txt'}")
            elif found := _matches(path):
                files.update(found)
            else:
                missing = "matches no file" if glob.has_magic(str(path)) else "does not exist"
                problems.append(f"{key}: {path} {missing}")
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{key}: {text} cannot be read ({error.strerror})")
    if problems or not files:
        raise UserError("\n".join(problems) or f"{key}: no files given")
    return sorted(files, key=lambda path: (isinstance(path, StorePath), path))


def _matches(pattern: AnyPath) -> list[AnyPath]:
    if isinstance(pattern, StorePath):
        return pattern.matches()
    return [file for file in map(Path, glob.iglob(str(pattern), recursive=True)) if file.is_file()]
