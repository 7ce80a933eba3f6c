"""The interface of tokenizers, and the encoding of texts of any length."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """The interface of all tokenizers. They can be pickled."""

    @property
    def vocab_size(self) -> int:
        """Upper bound of all ids, those of control tokens included."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The control token that begins a document; None if the vocabulary has none."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The control token that ends a document; None if the vocabulary has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without control tokens: the name of one inside the text is encoded as plain text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens, and ids beyond the vocabulary (of a padded model), are skipped."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that change whenever the vocabulary or the rules do."""
        ...


def digest(*chunks: bytes) -> str:
    """16 hex digits of a SHA-256 checksum, for `Tokenizer.fingerprint`."""
    return hashlib.sha256(b"\0".join(chunks)).hexdigest()[:16]


_CHUNK = 1 << 14  # characters
_AROUND = 1 << 9  # characters on each side of a cut that are compared
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


def encode_long(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text of any length, int32 [n]: those of `tokenizer.encode`, which may need 400 bytes of memory a token.

    The text is cut before spaces between two words. For some tokenizers such a cut changes the ids (a `tokenizers` file
    may put a mark before every text); the first cut shows that, and they get the text whole.
    """
    cuts = [0]
    while (cut := _BETWEEN_WORDS.search(text, cuts[-1] + _CHUNK)) is not None:
        cuts.append(cut.start())
    cuts.append(len(text))

    def encode(start: int, end: int) -> np.ndarray:
        return np.array(tokenizer.encode(text[start:end]), np.int32)

    if len(cuts) > 2:
        start, cut, end = cuts[1] - _AROUND, cuts[1], cuts[1] + _AROUND
        if not np.array_equal(encode(start, end), np.concatenate([encode(start, cut), encode(cut, end)])):
            cuts = [0, len(text)]
    return np.concatenate([encode(start, end) for start, end in itertools.pairwise(cuts)])
