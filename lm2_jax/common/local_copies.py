"""Local copies of what is in a store, for libraries that read files: tokenizers, safetensors, numpy, ArrayRecord.

They are in $LM2_JAX_CACHE, or else in ~/.cache/lm2_jax, by address and version, so that a changed object is copied
again. Copies that nobody has asked for in a week are removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath, StorePath, to_path

_PART = 1 << 24  # bytes of a request
_REQUESTS = 8  # at a time
_WEEK = 7 * 24 * 3600.0


def cache_directory() -> Path:
    """The directory of all copies."""
    return Path(os.environ.get("LM2_JAX_CACHE") or Path.home() / ".cache" / "lm2_jax")


def local_copy(path: AnyPath) -> Path:
    """A file of this machine with the content of `path`: itself, or a copy. Raises OSError if it cannot be read."""
    if isinstance(path, Path):
        return path
    status = path.stat()
    file = _place(f"{path} {status.version}") / path.name
    if not file.exists():
        with _whole(file) as partial:
            download(path, status.st_size, partial)
    return file


def local_tree(directory: AnyPath, names: Sequence[str] | None = None) -> Path:
    """A directory of this machine with the files below `directory`: itself, or a copy.

    names: of the files in it that are wanted; None: all files, at any depth. Raises OSError if there is none.
    """
    if isinstance(directory, Path):
        return directory
    paths = directory.files() if names is None else [p for p in directory.iterdir() if p.name in names and p.is_file()]
    files = [(path, path.stat()) for path in paths]
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory))
    versions = "\n".join(f"{path} {status.version}" for path, status in files)
    tree = _place(versions) / directory.name
    if not tree.exists():
        with _whole(tree) as partial:
            partial.mkdir()
            for path, status in files:
                target = partial / path.relative_to(directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                download(path, status.st_size, target)
    return tree


def local_input(path: AnyPath, key: str) -> Path:
    """A directory, or a file with those beside it, that a flag `key` names, or a copy.

    Raises UserError if one in a store cannot be read.
    """
    if isinstance(path, Path):
        return path
    try:
        if path.suffix == ".gguf":
            return local_copy(path)
        return local_tree(path) if path.is_dir() else local_tree(path.parent) / path.name
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror})") from None


def directory_of(text: str, key: str) -> Path:
    """The directory that a setting `key` names, or a copy. Raises UserError if one in a store cannot be read."""
    path = to_path(text, key)
    try:
        return local_tree(path)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror})") from None


def download(path: StorePath, size: int, target: Path) -> None:
    """Copies an object of `size` bytes into a local file, in a few requests at a time."""
    with target.open("wb") as file, ThreadPoolExecutor(_REQUESTS) as pool:
        spans = [(start, min(start + _PART, size)) for start in range(0, size, _PART)]
        for first in range(0, len(spans), _REQUESTS):  # so many parts are in memory
            for data in pool.map(lambda span: path.read_range(*span), spans[first : first + _REQUESTS]):
                file.write(data)


def _place(identity: str) -> Path:
    """The directory of a copy."""
    root = cache_directory() / "copies"
    place = root / hashlib.sha256(identity.encode()).hexdigest()[:24]
    place.mkdir(parents=True, exist_ok=True)
    os.utime(place)
    _remove_old(root)
    return place


@functools.cache  # once a process: there are as many copies as a data set has shards
def _remove_old(root: Path) -> None:
    """Removes the copies that nobody has asked for in a week."""
    for place in root.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it too
            if time.time() - place.stat().st_mtime > _WEEK:
                shutil.rmtree(place)


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A place to write to that becomes `target` once it is whole, unless another process was faster."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        if not target.exists():
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
