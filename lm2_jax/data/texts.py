"""From bytes to texts to tokens: what text files and JSON lines have in common wherever they are read."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import short_repr
from lm2_jax.tokenizer import Tokenizer, encode_long

_LONGEST_LINE = 1 << 25  # bytes: lists in lists take some 30 times as many once they are read


def bom_size(data: bytes) -> int:
    """Bytes of the byte order mark that a file may begin with."""
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0


def decode_text(data: bytes, where: str | Path, offset: int = 0) -> str:
    """Text of the bytes that stand at `offset` of what `where` names. Raises UserError if they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text, byte {offset + error.start} is {data[error.start]:#04x}") from None


def cut_text(text: str, separator: str | None) -> Iterator[str]:
    """The pieces of a text, in order and together all of it; a new one starts where `separator` (a regex) matches."""
    cuts = (match.start() for match in re.finditer(separator, text, re.M)) if separator else ()
    for first, last in itertools.pairwise((0, *cuts, len(text))):
        if last > first:
            yield text[first:last]


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, with their ends; of one that is too long, which `check_line` refuses, the beginning."""
    while line := file.readline(_LONGEST_LINE + 1):
        yield line
        while len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_LINE + 1)


def check_line(line: bytes, where: str) -> None:
    """Raises UserError for a line that is too long to be parsed."""
    if len(line) > _LONGEST_LINE:
        raise UserError(f"{where}: is longer than {_LONGEST_LINE:,} bytes; cut its text")


def json_text(line: str, where: str, field: str = "text") -> str:
    """The text in a JSON line's `field`. Raises UserError if it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: holds {type(value).__name__}; expected an object, {{"{field}": "..."}}')
    if field not in value:
        raise UserError(f"{where}: has no {field!r}; its keys are {short_repr(list(value))[1:-1] or 'none'}")
    text = value[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is {type(text).__name__}; expected a string")
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: {field!r} holds half a surrogate pair (\\ud800-\\udfff), which is no character")
    return text


def tokenize(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a document, int32 [n], between the begin and the end token where the tokenizer has them."""
    begin, end = (np.array([] if id is None else [id], np.int32) for id in (tokenizer.bos_id, tokenizer.eos_id))
    return np.concatenate([begin, encode_long(tokenizer, text), end])
