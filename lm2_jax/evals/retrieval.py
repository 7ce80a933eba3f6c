"""Retrieval before reading, as in BABILong's baseline (arXiv 2406.10149): a model sees only what is found.

Here sentences are ranked by BM25 as Lucene computes it (k1 = 1.5, b = 0.75), in the package bm25s.
"""

from __future__ import annotations

import importlib.util
import re

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.data.babi.background import split_sentences

_WORD = r"(?u)\b\w+\b"


def check_retrieval() -> None:
    """Raises UserError if bm25s is not installed."""
    if importlib.util.find_spec("bm25s") is None:
        raise UserError("eval.babilong.retrieval bm25: bm25s is missing; pip install 'bm25s>=0.3,<0.4'")


def find_sentences(context: str, question: str, count: int) -> str:
    """The `count` sentences of the context that fit the question best, in their order; the later of two equal ones.

    Without a word in either all sentences are equal.
    """
    import bm25s

    sentences = split_sentences(context)
    if not re.search(r"\w", context) or not re.search(r"\w", question):
        return " ".join(sentences[-count:])
    options = {"token_pattern": _WORD, "stopwords": None, "return_ids": False, "show_progress": False}
    ranking = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    ranking.index(bm25s.tokenize(sentences, **options), show_progress=False)
    (words,) = bm25s.tokenize(question, **options)
    scores = ranking.get_scores(words)
    best = np.lexsort((np.arange(len(sentences)), scores))[-count:]
    return " ".join(sentences[index] for index in sorted(best))
