"""A word-level tokenizer for the generator's own stories: no file, some two hundred words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lm2_jax.tokenizer.base import digest

# Their order gives the ids that trained models rely on: the generator may use fewer words, never others.
_WORDS = """
. ? above admires after all always among and apple as at autumn back baker bathroom bedroom before behind bells
belong beside beyond bill birds books bridge bright candle carefully clock clouds cold counts covers curious
daniel dawn describes did discarded doctor down dreams dropped dusk dusty east evening every fades famous farmer
few fields flowers football forest forgets fred garden gave gentle give gladly glows golden got grabbed grows
hallway handed harbour heavy hides hills horses in is island jeff john journeyed kitchen lamps lantern lasts
left letter listens loves many market mary milk morning mountain moved narrow near needs neighbour no noon north
of office often old one painter paints passed past people piano picked please poet proudly put quiet quietly
rarely received remembers repairs rests river roads sailor sandra say seem shines ships silver simple sings
sleeps slowly small softly some songs south spring stars still stones story such summer supper tall teacher that
the there this those to took tower travelled trees trembles under up village waits warm was watches went west
what where who windows winter with
"""
_SPACE_BEFORE_MARK = re.compile(r" (?=[.?!,](?: |$))")


class StoriesTokenizer:
    """Encodes the words and punctuation marks of generated stories and built-in background sentences.

    Everything is lower-cased: "The" at the start of a sentence and "the" inside it are one word, which keeps the
    vocabulary small. Ids are 0 <unk>, 1 <bos>, 2 <eos>, then the sorted words; `words` lists them by id.
    """

    PATTERN = r"[a-z]+(?:'[a-z]+)?|\S"  # a word or a mark, once the text is lower-case
    unk_id, bos_id, eos_id = 0, 1, 2

    def __init__(self) -> None:
        self.words = ("<unk>", "<bos>", "<eos>", *_WORDS.split())
        self._ids = {word: i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words and marks of a text, without <bos> and <eos>; an unknown word or mark is <unk>."""
        return [self._ids.get(word, self.unk_id) for word in re.findall(self.PATTERN, text.lower())]

    def decode(self, ids: Iterable[int]) -> str:
        """Lower-case text, without spaces before marks; <bos>, <eos> and ids beyond the vocabulary are skipped."""
        words = [self.words[i] for i in ids if i < self.vocab_size and i not in (self.bos_id, self.eos_id)]
        return _SPACE_BEFORE_MARK.sub("", " ".join(words))

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return digest("\n".join(self.words).encode())
