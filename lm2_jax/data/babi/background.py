"""Background: sentences that have nothing to do with a story, from a small grammar or from books."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import expand_paths
from lm2_jax.common.storage import AnyPath

_SLOTS = {
    "ADJECTIVE": "old quiet bright small heavy gentle golden cold warm dusty silver narrow famous curious simple tall",
    "NOUN": "river teacher farmer sailor painter village market harbour forest mountain letter clock lantern bridge "
    "story candle baker doctor poet island winter tower neighbour piano",
    "PLURAL": "hills clouds stones trees birds horses ships songs lamps roads flowers stars windows fields books bells",
    "RESTS": "sleeps waits shines grows rests sings fades trembles glows listens dreams lasts",
    "WATCHES": "watches paints remembers admires describes forgets covers counts loves hides repairs needs",
    "OFTEN": "slowly quietly often gladly softly rarely always carefully proudly still",
    "NEAR": "past near under above beside beyond behind among",
    "TIME": "in_spring in_autumn at_dawn at_dusk at_noon every_evening every_morning after_supper all_summer",
}
_TEMPLATES = (
    "The ADJECTIVE NOUN RESTS OFTEN NEAR ADJECTIVE PLURAL",
    "The NOUN WATCHES the ADJECTIVE PLURAL TIME",
    "One ADJECTIVE NOUN OFTEN WATCHES the PLURAL",
    "Many PLURAL and PLURAL belong with the NOUN",
    "Every ADJECTIVE NOUN WATCHES some PLURAL",
    "No NOUN RESTS OFTEN TIME",
    "People say that the NOUN RESTS TIME",
    "Such ADJECTIVE PLURAL please the ADJECTIVE NOUN",
    "This NOUN OFTEN RESTS NEAR those PLURAL TIME",
    "Few PLURAL seem as ADJECTIVE as the NOUN",
)
_WORDS = {slot: tuple(word.replace("_", " ") for word in words.split()) for slot, words in _SLOTS.items()}
_GRAMMAR = tuple(tuple(_WORDS.get(part, (part,)) for part in template.split()) for template in _TEMPLATES)
_MOST_PARTS = max(map(len, _GRAMMAR))

NOUNS, ADJECTIVES = _WORDS["NOUN"], _WORDS["ADJECTIVE"]

BACKGROUND_LEXICON: tuple[str, ...] = tuple(
    sorted({".", *(word for template in _GRAMMAR for part in template for words in part for word in words.split())})
)
"""Every word and mark of the built-in sentences, as written; no person, place, object, direction or verb of bAbI."""

_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019)]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)"
    r"\s+(?=[\"'\u201c\u2018(]?[A-Z])"
)
_FEWEST_WORDS = 10


def builtin_sentences(rng: np.random.Generator) -> Iterator[str]:
    """Yields sentences of 6 to 9 words without end, such as "The old lantern glows softly under golden clouds."."""
    while True:
        for which, *draws in rng.random((16, 1 + _MOST_PARTS)).tolist():
            template = _GRAMMAR[int(which * len(_GRAMMAR))]
            words = [part[int(draw * len(part))] for part, draw in zip(template, draws, strict=False)]
            yield " ".join(words) + "."


class BookBackground:
    """Sentences of real text in their natural order, as BABILong scatters facts in (arXiv 2406.10149).

    Sentences under 10 words are left out, and so are the first and the last of a file. All files are held in memory.

    Raises UserError if a file or pattern matches nothing, cannot be read as UTF-8, or has no usable sentence.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._books = [_usable_sentences(path) for path in expand_paths(paths, "data.background")]

    def sentences(self, rng: np.random.Generator) -> Iterator[str]:
        """Yields sentences without end from a random one of a random book on; after its end the book starts again."""
        book = self._books[rng.integers(len(self._books))]
        first = int(rng.integers(len(book)))
        while True:
            yield from book[first:]
            first = 0


class Books:
    """Sentences of real text in their natural order, each once.

    Sentences are split by a rule of our own, where BABILong has Punkt. Raises UserError if a file or pattern matches
    nothing, cannot be read as UTF-8, or holds no text.
    """

    def __init__(self, paths: Sequence[str], key: str = "eval.babilong.books") -> None:
        self._books = [split_sentences(_read_text(path, key)) for path in expand_paths(paths, key)]

    def sentences(self, rng: np.random.Generator) -> Iterator[str]:
        """Yields every sentence once, from a random character of a random book on.

        After that book the others follow in random order, then the text before that character. The first and the last
        sentence of each stretch are left out: the character may have cut the one, the end of the file the other.
        """
        first, *others = rng.permutation(len(self._books)).tolist()
        book = self._books[first]
        starts = list(accumulate((len(sentence) + 1 for sentence in book), initial=0))
        cut = bisect.bisect_right(starts, int(rng.integers(starts[-1])))  # the first that starts after the character
        yield from book[cut:-1]
        for other in others:
            yield from self._books[other][1:-1]
        yield from book[1 : cut - 1]


def split_sentences(text: str) -> list[str]:
    """Splits running text into sentences; line breaks and runs of spaces become one space."""
    return _SENTENCE_END.split(" ".join(text.split()))


def _read_text(path: AnyPath, key: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read as a UTF-8 text file ({error})") from None
    if not text.strip():
        raise UserError(f"{key}: {path} is empty; name running text such as a book")
    return text


def _usable_sentences(path: AnyPath) -> list[str]:
    text = _read_text(path, "data.background")
    sentences = [sentence for sentence in split_sentences(text)[1:-1] if len(sentence.split()) >= _FEWEST_WORDS]
    if not sentences:
        raise UserError(
            f"data.background: {path} has {len(text)} characters but no sentence of {_FEWEST_WORDS} words or more "
            "between its first and last; use running text such as a book"
        )
    return sentences
