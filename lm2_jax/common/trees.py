"""Files and directories of either kind: copied, moved, removed, and written where nothing half-done is seen."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm2_jax.common.storage import AnyPath, StorePath

_BUFFER = 1 << 23  # bytes


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copies a file; one of a store appears whole or not at all."""
    if isinstance(source, Path):
        target.upload(source) if isinstance(target, StorePath) else shutil.copyfile(source, target)
    elif isinstance(target, Path):
        with source.open("rb") as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _BUFFER)
    elif source.filesystem is target.filesystem:  # which copies it by itself
        with target.reported():
            target.filesystem.cp_file(source.key, target.key)
    else:
        target.write_bytes(source.read_bytes())


def move_file(source: AnyPath, target: AnyPath) -> None:
    """Gives a file another name in its directory or store."""
    if isinstance(source, Path):
        source.replace(target)
        return
    copy_file(source, target)
    source.unlink()


def remove_tree(path: AnyPath) -> None:
    """Removes a directory and everything in it, or what can be removed of it."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with path.reported(), contextlib.suppress(FileNotFoundError):
        path.filesystem.rm(path.key, recursive=True)


def move_tree(source: AnyPath, target: AnyPath) -> None:
    """Moves a directory; of a store, object by object."""
    if isinstance(source, Path):
        source.rename(target)
        return
    for path in source.files():
        copy_file(path, target / path.relative_to(source))
    remove_tree(source)


def upload_tree(source: Path, target: StorePath, last: Sequence[str] = ()) -> None:
    """Copies a local directory into a store; files of the names `last`, by which it is recognised, come last."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name in last)
    for path in files:
        (target / path.relative_to(source).as_posix()).upload(path)


def copy_tree(source: Path, target: AnyPath) -> None:
    """Copies what is in a local directory into another one or into a store, beside what is there."""
    if isinstance(target, Path):
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        upload_tree(source, target)


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[Path]:
    """A local file to write; once written, it is at `path`, which in a store has it whole or not at all."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        yield (file := Path(directory) / path.name)
        path.upload(file)


@contextlib.contextmanager
def writing_tree(directory: AnyPath) -> Iterator[Path]:
    """A local directory to write into; in the end, what is there is in `directory`, beside what was there before."""
    if isinstance(directory, Path):
        yield directory
        return
    with tempfile.TemporaryDirectory() as here:
        yield Path(here)
        upload_tree(Path(here), directory)


@contextlib.contextmanager
def scratch_in(directory: AnyPath) -> Iterator[Path]:
    """A directory for what is not whole yet: `directory` itself, or for one of a store a temporary one."""
    if isinstance(directory, Path):
        yield directory
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
