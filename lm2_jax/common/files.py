"""Files that survive a kill, and directories that one process at a time may write to."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lm2_jax.common.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that exists completely or not at all, even if the process is killed."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
