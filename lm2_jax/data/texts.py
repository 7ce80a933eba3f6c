"""From bytes to texts to tokens: how text files and JSON lines are decoded, in training and in preparation alike."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import short_repr
from lm2_jax.tokenizer import Tokenizer, prompt_ids

# Endings of prose and programs, or none
_PLAIN_TEXT = re.compile(r"|\.(txt|text|md|markdown|rst|tex|py|c|h|cc|cpp|go|java|jl|js|rs|sh|ts)", re.IGNORECASE)
_LONGEST_LINE = 1 << 25  # bytes: parsed, nested lists take some 30 times as many


def is_text_ending(ending: str) -> bool:
    """True if files of this ending (".txt"; "": none) are plain text, without rows, tags or quotes around it."""
    return bool(_PLAIN_TEXT.fullmatch(ending))


def bom_size(data: bytes) -> int:
    """Bytes of the byte order mark that a file may begin with."""
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0


def decode_text(data: bytes, where: str | Path, offset: int = 0) -> str:
    """Decodes bytes found at `offset` of the file `where`. Raises UserError if they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text, byte {offset + error.start} is {data[error.start]:#04x}") from None


def cut_text(text: str, separator: str | None) -> Iterator[str]:
    """Cuts a text into documents, leaving nothing out; a new one starts where `separator` (a regex) matches."""
    cuts = (match.start() for match in re.finditer(separator, text, re.M)) if separator else ()
    for first, last in itertools.pairwise((0, *cuts, len(text))):
        if last > first:
            yield text[first:last]


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file with their ends; too long a line, which `check_line` refuses, only in part."""
    while line := file.readline(_LONGEST_LINE + 1):
        yield line
        while len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_LINE + 1)


def check_line(line: bytes, where: str) -> None:
    """Raises UserError for a line that is too long to be parsed."""
    if len(line) > _LONGEST_LINE:
        raise UserError(f"{where}: is longer than {_LONGEST_LINE:,} bytes; split its text")


def json_text(line: str, where: str, field: str = "text") -> str:
    """Reads the text in a JSON line's `field`. Raises UserError if there is none."""
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
        raise UserError(f"{where}: {field!r} holds half a surrogate pair (\\ud800-\\udfff), which is not a character")
    return text


def table_texts(file: BinaryIO, field: str, delimiter: str, where: str) -> Iterator[str | None]:
    """Yields the texts in a column of a table with a header line (CSV or TSV), where a quoted text may span lines.

    A row with more or fewer columns than the header yields None; empty lines are left out. Raises UserError if there is
    no such column and for bytes that are not UTF-8, csv.Error for quotes that are not closed.
    """

    def lines() -> Iterator[str]:
        for number, line in enumerate(read_lines(file), 1):
            check_line(line, f"{where}: line {number}")
            yield decode_text(line[bom_size(line) :] if number == 1 else line, f"{where}: line {number}")

    csv.field_size_limit(_LONGEST_LINE)
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    header = next(rows, [field])
    if header.count(field) != 1:
        found = "two columns" if field in header else "no column"
        raise UserError(f"{where}: has {found} {field!r}; its columns are {short_repr(header)[1:-1]}")
    column = header.index(field)
    yield from (row[column] if len(row) == len(header) else None for row in rows if row)


def tokenize(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenises a document: ids int32 [n], from what begins every text to the end token, if there are such tokens."""
    special = tokenizer.special
    end = [] if special.eos_id is None else [special.eos_id]
    return np.concatenate([prompt_ids(tokenizer, text), np.array(end, np.int32)])
