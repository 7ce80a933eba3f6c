"""A word-level tokenizer for the generator's own stories: no file, some two hundred words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from lm2_jax.data.background import BACKGROUND_LEXICON
from lm2_jax.data.worlds import LEXICON

_SPACE_BEFORE_MARK = re.compile(r" (?=[.?!,](?: |$))")


class StoriesTokenizer:
    """Words and punctuation marks of stories and built-in background as ids.

    Everything is lower-cased: "The" at the start of a sentence and "the" inside it are one word, which keeps the
    vocabulary small. Ids are 0 <unk>, 1 <bos>, 2 <eos>, then the sorted words; `words` lists them by id.
    """

    PATTERN = r"[a-z]+(?:'[a-z]+)?|\S"  # a word or a mark, once the text is lower-case
    unk_id, bos_id, eos_id = 0, 1, 2

    def __init__(self) -> None:
        words = {word.lower() for word in (*LEXICON, *BACKGROUND_LEXICON)}
        self.words = ("<unk>", "<bos>", "<eos>", *sorted(words))
        self._ids = {word: i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words and marks of a text, without <bos> and <eos>; an unknown word or mark is <unk>."""
        return [self._ids.get(word, self.unk_id) for word in re.findall(self.PATTERN, text.lower())]

    def decode(self, ids: Iterable[int]) -> str:
        """Lower-case text, no space before a mark; <bos>, <eos> and ids past the vocabulary are left out."""
        words = [self.words[i] for i in ids if i < self.vocab_size and i not in (self.bos_id, self.eos_id)]
        return _SPACE_BEFORE_MARK.sub("", " ".join(words))

    def fingerprint(self) -> str:
        """16 hex digits that change with the vocabulary."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:16]
