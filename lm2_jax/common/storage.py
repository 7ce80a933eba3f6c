"""Paths: of this machine, or of an object store (gs://bucket/name, and s3:// where s3fs is installed).

`to_path` turns what a user wrote into one of them, and everything that takes a path goes through it. An object store
has no directories, renames or appending: a directory is there as long as an object is below it, an object is written
whole or not at all, and `journal.py` and `lease.py` stand for what is appended to and locked.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import glob
import importlib
import io
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lm2_jax.common.errors import UserError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # Path("gs://x") has one slash left
_PACKAGES = {"gs": ("gcsfs", "gcsfs"), "s3": ("s3fs", "s3fs")}  # module, and what to install, by scheme
_READ_AHEAD = 1 << 23  # bytes
_REQUESTS = 64  # at a time


def to_path(text: str | Path | StorePath, key: str = "") -> AnyPath:
    """The path that a user means: `~` and `$HOME` are the home directory, file:// is this machine.

    Raises UserError, naming the setting or flag `key`, for schemes that are not known or not installed.
    """
    if isinstance(text, StorePath):
        return text
    text, where = os.fspath(text), f"{key}: " if key else ""
    found = _URL.match(text)
    if not found:
        for home in ("$HOME", "${HOME}"):
            if text == home or text.startswith(home + "/"):
                text = "~" + text.removeprefix(home)
        return Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file":
        return Path("/" + urllib.parse.unquote(rest))
    if scheme not in _PACKAGES:
        raise UserError(f"{where}{text}: {scheme}:// is not known; give gs://, s3:// or a path of this machine")
    if not rest.strip("/"):
        raise UserError(f"{where}{text}: names no bucket; write {scheme}://bucket/name")
    module, package = _PACKAGES[scheme]
    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError(f"{where}{text}: {scheme}:// needs {package}; pip install {package}") from None
    return StorePath(scheme, PurePosixPath("/" + rest))


def to_local_path(text: str | Path) -> Path:
    """`to_path` for what works on files of this machine only. Raises UserError for paths of a store too."""
    found = _URL.match(os.fspath(text))
    if found and found[1].lower() in _PACKAGES:  # installed or not
        raise UserError(f"{text}: give a path of this machine here; copy it from or to the store by yourself")
    return to_path(text)


class Stat(NamedTuple):
    """Size and time of an object, by the names that `Path.stat` has for them; `version` changes with every writing."""

    st_size: int
    st_mtime_ns: int
    version: str


@functools.total_ordering
class StorePath:
    """A path of an object store, with the methods of `pathlib.Path` that are used here.

    It is no os.PathLike: what opens files by name would make a local one of it. Failures are OSErrors with `strerror`,
    as of files; what may be the network's is tried again for two minutes.
    """

    def __init__(self, scheme: str, path: PurePosixPath) -> None:
        self._scheme, self._path = scheme, path

    # --- The name --------------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """bucket/name."""
        return str(self._path).strip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return self._path.name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return self._path.stem

    @property
    def suffix(self) -> str:
        """The ending of the last part, such as .txt."""
        return self._path.suffix

    @property
    def suffixes(self) -> list[str]:
        """The endings of the last part, such as .jsonl and .gz."""
        return self._path.suffixes

    @property
    def parent(self) -> StorePath:
        """The directory that it is in."""
        return StorePath(self._scheme, self._path.parent)

    def __truediv__(self, other: str) -> StorePath:
        return StorePath(self._scheme, self._path / other)

    def with_name(self, name: str) -> StorePath:
        """Another name in the same directory."""
        return StorePath(self._scheme, self._path.with_name(name))

    def with_suffix(self, suffix: str) -> StorePath:
        """The same name with another ending."""
        return StorePath(self._scheme, self._path.with_suffix(suffix))

    def absolute(self) -> StorePath:
        """Itself."""
        return self

    def __str__(self) -> str:
        return f"{self._scheme}://{self.key}"

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __lt__(self, other: Any) -> bool:
        return str(self) < str(other)

    # --- What is there ---------------------------------------------------------------------------------------------

    @property
    def filesystem(self) -> Any:
        """The store, as fsspec has it."""
        return _filesystem(self._scheme)

    def is_file(self) -> bool:
        """True if there is an object of this name."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """True if there are objects below this name, or if it is a bucket."""
        return self._kind() == "directory"

    def exists(self) -> bool:
        """True if it is a file or a directory."""
        return self._kind() is not None

    def _kind(self) -> str | None:
        with self.reported():
            try:
                return self.filesystem.info(self.key)["type"]
            except FileNotFoundError:
                return None

    def stat(self) -> Stat:
        """Size, time and version of the object. Raises FileNotFoundError if there is none."""
        with self.reported():
            info = self.filesystem.info(self.key)
            if info["type"] != "file":
                raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        changed = info.get("mtime") or info.get("LastModified")
        version = info.get("generation") or info.get("ETag") or changed
        return Stat(info["size"], int(changed.timestamp() * 1e9) if changed else 0, str(version))

    def iterdir(self) -> Iterator[StorePath]:
        """The files and directories directly in it, sorted. Raises FileNotFoundError if it is not there."""
        with self.reported():
            names = self.filesystem.ls(self.key, detail=False)
        for name in sorted({name.strip("/") for name in names} - {self.key}):
            yield StorePath(self._scheme, PurePosixPath("/" + name))

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """The paths below it that match a pattern; one of a single part needs one listing."""
        if "/" not in pattern and "**" not in pattern:
            with contextlib.suppress(FileNotFoundError):
                yield from [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern)]
            return
        with self.reported():
            names = self.filesystem.glob(f"{self.key}/{pattern}")
        for name in sorted(names):
            yield StorePath(self._scheme, PurePosixPath("/" + name))

    def sizes(self) -> dict[str, int]:
        """Bytes of the objects directly in the directory, by name. Raises FileNotFoundError if it is not there."""
        with self.reported():
            found = self.filesystem.ls(self.key, detail=True)
        return {PurePosixPath(info["name"]).name: info["size"] for info in found if info["type"] == "file"}

    def matches(self) -> list[StorePath]:
        """The objects whose names match this one, as a pattern (`**`: any depth of directories)."""
        with self.reported():
            found = self.filesystem.glob(self.key, detail=True) if glob.has_magic(self.key) else {}
        names = sorted(name for name, info in found.items() if info["type"] == "file")
        return [StorePath(self._scheme, PurePosixPath("/" + name)) for name in names]

    def files(self) -> list[StorePath]:
        """Every object below the directory."""
        with self.reported():
            try:
                found = self.filesystem.find(self.key)
            except FileNotFoundError:
                return []
        return [StorePath(self._scheme, PurePosixPath("/" + name)) for name in sorted(found)]

    def relative_to(self, directory: StorePath) -> str:
        """The name below a directory."""
        return str(self._path.relative_to(directory._path))

    # --- Reading and writing ---------------------------------------------------------------------------------------

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the object for reading bytes, with 8 MiB read ahead."""
        if mode != "rb":
            raise ValueError(f"{self}: objects are opened for reading bytes, not {mode!r}")
        return io.BufferedReader(_Reader(self), _READ_AHEAD)

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop`."""
        if stop <= start:
            return b""
        with self.reported():
            return self.filesystem.cat_file(self.key, start=start, end=stop)

    def read_bytes(self) -> bytes:
        """The whole object."""
        with self.reported():
            return self.filesystem.cat_file(self.key)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text, lines ending in \\n."""
        return io.StringIO(self.read_bytes().decode(encoding), newline=None).read()

    def write_bytes(self, data: bytes) -> None:
        """Writes the object, completely or not at all."""
        with self.reported():
            self.filesystem.pipe_file(self.key, data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Writes the object as text, completely or not at all."""
        self.write_bytes(text.encode(encoding))

    def upload(self, file: Path) -> None:
        """Writes the object, completely or not at all, from a local file of any size."""
        with self.reported():
            self.filesystem.put_file(str(file), self.key)

    def write_if(self, data: bytes, version: str) -> None:
        """Writes the object if it has this version ("0": if there is none). Raises FileExistsError if it has not.

        Stores other than Google's compare no version while they write: there it was read before.
        """
        with self.reported():
            if hasattr(self.filesystem, "write_if"):
                self.filesystem.write_if(self.key, data, int(version))
            elif version == "0":
                self.filesystem.pipe_file(self.key, data, mode="create")
            elif self.stat().version == version:
                self.filesystem.pipe_file(self.key, data)
            else:
                raise FileExistsError(errno.EEXIST, "it was written by another process", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        with self.reported():
            try:
                self.filesystem.rm_file(self.key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a directory of a store is there once it holds an object."""

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Turns what stores' libraries raise into OSErrors with `strerror`."""
        try:
            yield
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(*_reason(error), str(self)) from None  # of the class that belongs to the number
        except Exception as error:  # of any of the libraries below fsspec
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            status = getattr(error, "code", None)
            if status in (401, 403):
                raise PermissionError(errno.EACCES, "no permission", str(self)) from None
            raise OSError(errno.EIO, f"the store cannot be reached ({text})", str(self)) from None


AnyPath = Path | StorePath


def _reason(error: OSError) -> tuple[int, str]:
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT, "no such object, or no such bucket"
    if isinstance(error, FileExistsError):
        return errno.EEXIST, "it is there already"
    if isinstance(error, PermissionError) or "Forbidden" in text:
        return errno.EACCES, "no permission"
    return errno.EIO, f"the store cannot be reached ({type(error).__name__}: {text[:200]})"


class _Reader(io.RawIOBase):
    """Bytes of an object, a request a read."""

    def __init__(self, path: StorePath) -> None:
        self._path, self._size, self._at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence], 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._path.read_range(self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@functools.cache
def _filesystem(scheme: str) -> Any:
    if scheme == "gs":
        from lm2_jax.common.gcs import connect  # gcsfs is an extra
    else:
        import fsspec

        connect = functools.partial(fsspec.filesystem, scheme, use_listings_cache=False)
    return connect()


def read_ranges(spans: Sequence[tuple[StorePath, int, int]]) -> list[bytes]:
    """Reads bytes of objects of one store, (path, start, stop) each, many requests at a time. Raises OSError."""
    if not spans:
        return []
    paths, starts, stops = zip(*spans, strict=True)
    with paths[0].reported():
        filesystem = paths[0].filesystem
        keys = [path.key for path in paths]
        return filesystem.cat_ranges(keys, list(starts), list(stops), batch_size=_REQUESTS, on_error="raise")


def has_directory(path: AnyPath) -> bool:
    """True if a file can be put at `path`: its directory exists, or needs none."""
    return isinstance(path, StorePath) or path.absolute().parent.is_dir()
