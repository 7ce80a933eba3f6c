"""GGUF, the file format of llama.cpp: settings and tensors by name (versions 2 and 3, little-endian).

The header is read here, every length checked against the file, as it may come from anywhere. The `gguf` package, an
optional one, turns quantised tensors into numbers; they stay in the file, which is mapped into memory, until read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import short_repr
from lm2_jax.convert.tensors import Tensor

_LONGEST_HEADER = 1 << 26  # bytes; Llama 3's, with 128,256 tokens and 280,147 merges, has 8 million
_MOST_DIMENSIONS = 4
_SCALARS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")  # by number of type
_STRING, _ARRAY = 8, 9


class GgufFile(NamedTuple):
    """Contents of a file.

    Attributes:
      settings: by key; numbers, truths, texts and lists of one of these.
      tensors: by name, with the sizes that torch would give them; quantised ones are read as float32. `read` takes an
        array of rows, too.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def open_gguf(path: Path) -> GgufFile:
    """Opens a file. Raises UserError if it is damaged, truncated, or quantised in a way that is not known."""
    try:
        import gguf  # needed by this alone
    except ImportError:
        raise UserError(f"{path}: to read a GGUF file, install gguf (pip install gguf)") from None
    try:
        data = np.memmap(path, mode="r")
        header = _Header(memoryview(data)[:_LONGEST_HEADER])
        settings, entries = header.read()
        start = header.aligned(settings.get("general.alignment", 32))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is no whole GGUF file of version 2 or 3 ({error})") from None

    tensors, problems, ends = {}, [], 0
    for name, (shape, number, offset) in sorted(entries.items(), key=lambda entry: entry[1].offset):
        try:
            kind, row_bytes = _quantisation(gguf, number, shape)
            size = math.prod(shape[:-1]) * row_bytes
            if start + offset + size > len(data):
                raise ValueError("the file ends before its last number; is it truncated?")
            if offset < ends:
                raise ValueError("overlaps another tensor")
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        ends = offset + size
        rows = data[start + offset : start + ends].reshape(*shape[:-1], row_bytes)
        tensors[name] = Tensor(path, shape, "F32", _reader(gguf, rows, kind))
    if problems:
        raise UserError(
            f"{path}: {len(problems)} problem(s) with its tensors:\n" + "\n".join(f"  {p}" for p in problems)
        )
    return GgufFile(settings, tensors)


def _quantisation(gguf: Any, number: int, shape: tuple[int, ...]) -> tuple[Any, int]:
    """The type of that number, and bytes of a row. Raises ValueError if it is not known, or rows are not whole."""
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise ValueError(f"has type {number}, which the gguf package that is installed cannot read") from None
    if shape[-1] % block:
        raise ValueError(f"has rows of {shape[-1]} numbers; {kind.name} has blocks of {block}")
    return kind, shape[-1] // block * block_bytes


def _reader(gguf: Any, rows: np.ndarray, kind: Any) -> Callable[..., np.ndarray]:
    def read(row: Any = None) -> np.ndarray:
        return gguf.dequantize(rows if row is None else rows[row], kind)

    return read


class _TensorEntry(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    """Values of a header, one after another. Raises ValueError where it is damaged or ends."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._position = data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, _TensorEntry]]:
        """All settings, and the entries of all tensors."""
        if bytes(self._take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("<u4")) not in (2, 3):
            raise ValueError(f"its version is {version}")
        num_tensors, num_settings = self._number("<u8"), self._number("<u8")
        settings: dict[str, Any] = {}
        for _ in range(num_settings):
            key = self._string()
            if key in settings:
                raise ValueError(f"it names {short_repr(key)} twice")
            settings[key] = self._value(self._number("<u4"))
        tensors: dict[str, _TensorEntry] = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in tensors:
                raise ValueError(f"it names {short_repr(name)} twice")
            if not 0 < (dimensions := self._number("<u4")) <= _MOST_DIMENSIONS:
                raise ValueError(f"{short_repr(name)} has {dimensions} dimensions")
            shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
            if 0 in shape:
                raise ValueError(f"{short_repr(name)} has a size of 0")
            tensors[name] = _TensorEntry(shape, self._number("<u4"), self._number("<u8"))
        return settings, tensors

    def aligned(self, alignment: Any) -> int:
        """Start of the tensors: the next multiple of `alignment` bytes."""
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
            raise ValueError(f"general.alignment is {short_repr(alignment)}")
        return -(-self._position // alignment) * alignment

    def _take(self, size: int) -> memoryview:
        start, self._position = self._position, self._position + size
        if self._position > len(self._data):
            longest = " or is longer than any" if len(self._data) == _LONGEST_HEADER else ""
            raise ValueError(f"it ends within its header{longest}")
        return self._data[start : self._position]

    def _number(self, dtype: str) -> Any:
        value = np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0]
        return float(str(value)) if dtype == "<f4" else value.item()  # 1e-05, not 9.999999747378752e-06

    def _string(self) -> str:
        return str(self._take(self._number("<u8")), "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_dtype(kind))
        kind, length = self._number("<u4"), self._number("<u8")
        if kind == _STRING:
            return [self._string() for _ in range(length)]
        dtype = np.dtype(_dtype(kind))
        return np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()


def _dtype(kind: int) -> str:
    with contextlib.suppress(IndexError):
        if (dtype := _SCALARS[kind]) is not None:
            return dtype
    raise ValueError(f"it holds a value of type {kind}")
