"""A needle in a haystack: one fact, under a key, in a passage that repeats (S-NIAH-1 of RULER, arXiv 2404.06654).

RULER hides a number under a word. Here keys and values are words of the stories' lexicon: "The lantern of the sailor is
golden." is asked for by "What is the lantern of the sailor?".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lm2_jax.data.babi.background import ADJECTIVES, NOUNS
from lm2_jax.data.babi.files import Question, Statement, Story

_PASSAGE = (
    "The winter waits often near quiet hills.",
    "Many birds and trees belong with the river.",
    "No village sleeps always at noon.",
    "Every small harbour counts some ships.",
    "People say that the mountain rests in spring.",
)


def needle_story(rng: np.random.Generator) -> Story:
    """Makes up one statement and the question about it: one of 552 keys and 16 values."""
    what, whose = rng.choice(len(NOUNS), size=2, replace=False).tolist()
    key, value = f"{NOUNS[what]} of the {NOUNS[whose]}", ADJECTIVES[int(rng.integers(len(ADJECTIVES)))]
    return Statement(f"The {key} is {value}."), Question(f"What is the {key}?", value)


def repeated_passage(rng: np.random.Generator) -> Iterator[str]:
    """Yields the five sentences of the passage again and again."""
    while True:
        yield from _PASSAGE
