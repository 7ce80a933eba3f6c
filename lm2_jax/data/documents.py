"""Documents: token ids from text files, JSON lines and the official `.bin` shards, as random-access sources."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, tokenised.

    Attributes:
      tokens: int32 [n], with the tokenizer's begin and end tokens where it has them.
      answers: bool [n], True where the token belongs to the answer of a question.
    """

    tokens: np.ndarray
    answers: np.ndarray
