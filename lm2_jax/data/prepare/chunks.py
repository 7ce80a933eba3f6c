"""Inputs to prepare as streams of raw documents, handed out in chunks.

An input is read in order by one process, which is cheap; parsing a chunk into texts, and everything after that, is work
for many.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from lm2_jax.common.errors import UserError

Raw = bytes | str | None
CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive raw documents of an input.

    Attributes:
      first: number of the first document, from 1.
      raw: lines of JSON lines, values of a column, token ids as little-endian uint32; a text file as a whole.
      read: bytes of the input read so far (of a hub data set: bytes of its values).
    """

    first: int
    raw: tuple[Raw, ...]
    read: int

    @property
    def size(self) -> int:
        """Bytes of the raw documents; characters where they are text already."""
        return sum(len(raw or b"") for raw in self.raw)


class Unreachable(UserError):
    """An input that cannot be read now, though nothing shows damage: it is not skipped, for trying again may help."""


class Input(Protocol):
    """A stream of raw documents that can be pickled.

    Attributes:
      name: the file or hub data set, as messages and the manifest name it.
      size: bytes of the file; None if that is not known.
    """

    name: str
    size: int | None

    def read(self) -> Iterator[Chunk]:
        """Yields the raw documents in order; the same ones, in the same chunks, every time.

        If the rest cannot be read, raises UserError with the position, after everything before it has been yielded;
        Unreachable if trying again may help.
        """
        ...

    def parse(self, chunk: Chunk) -> Iterator[str | np.ndarray | UserError]:
        """Yields a text, or ids (int32 [n]), for each raw document; for a damaged one, a UserError that locates it."""
        ...

    def state(self) -> dict[str, Any]:
        """Name, size and the like, which show without reading all of the input whether it has changed."""
        ...

    def identity(self) -> dict[str, Any]:
        """The manifest's record of the input: name, size and checksum, or a revision."""
        ...


def chunked(values: Iterable[Raw], tell: Callable[[], int] | None, where: str) -> Iterator[Chunk]:
    """Yields values by the megabyte. An error in reading one follows those before it, as a UserError with its number.

    tell: returns the bytes of the input read so far; None: the values' own sizes are counted.
    """
    pending: list[Raw] = []
    first, size, before, failure = 1, 0, 0, None
    iterator = iter(values)
    while True:
        try:
            with reading(f"{where} {first + len(pending)}"):
                pending.append(next(iterator))
        except StopIteration:
            break
        except UserError as error:
            failure = error
            break
        size += len(pending[-1] or b"")
        if size >= CHUNK_BYTES:
            before += size
            yield Chunk(first, tuple(pending), tell() if tell else before)
            first, pending, size = first + len(pending), [], 0
    if pending:
        yield Chunk(first, tuple(pending), tell() if tell else before + size)
    if failure is not None:
        raise failure


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns errors that libraries raise for damaged files into UserErrors."""
    try:
        yield
    except EOFError:
        raise UserError(f"{where}: the compressed file is cut short") from None
    except (zlib.error, csv.Error, OSError, ValueError, arrow_error()) as error:
        text = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{where}: cannot be read ({text})") from None


def arrow_error() -> type[Exception]:
    """The base class of pyarrow's errors, if pyarrow is installed."""
    try:
        return importlib.import_module("pyarrow").ArrowException
    except ImportError:
        return OSError


def require(module: str, what: str) -> None:
    """Raises UserError if the package that `what` needs is not installed."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {package}; pip install {package}") from None
