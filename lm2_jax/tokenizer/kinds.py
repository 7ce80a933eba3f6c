"""The tokenizer of each `tokenizer.kind`, their interface, and the encoding of texts of any length."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor

from lm2_jax.common.errors import UserError

_MOST_IDS = 1 << 24
_CHUNK = 1 << 14  # characters
_AROUND = 1 << 9  # characters on each side of a cut that are compared
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


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


class BytesTokenizer:
    """UTF-8 bytes as ids 0-255; 256 begins a document and 257 ends it."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes among `ids`, with U+FFFD for bytes that are not UTF-8."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return digest(b"bytes")


class SentencePieceTokenizer:
    """A sentencepiece model, given as the bytes of its `.model` file.

    Raises RuntimeError if they are not such a model.
    """

    def __init__(self, model: bytes) -> None:
        if not model:
            raise RuntimeError("the file is empty")
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:  # whose message is a line of C++
            raise RuntimeError("its bytes cannot be parsed as one") from None
        self._fingerprint = digest(b"sentencepiece", model)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = (
            None if token < 0 else token for token in (self._processor.bos_id(), self._processor.eos_id())
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, as exact as the model's normalisation allows."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self._processor.decode([int(token) for token in ids if token < self.vocab_size])

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint


@contextlib.contextmanager
def report_damage(action: str) -> Iterator[None]:
    """Turns a panic of Rust (not an Exception), or an error of an incomplete model, into a UserError."""
    try:
        yield
    except (ValueError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"tokenizer.path: the model in the file is damaged, and cannot {action} ({error})") from None


class HuggingFaceTokenizer:
    """A `tokenizers` object; bos_id and eos_id are special tokens with the usual names."""

    _BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
    _EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")

    def __init__(self, tokenizer: tokenizers.Tokenizer, fingerprint: str) -> None:
        tokenizer.encode_special_tokens = True  # their names inside a text are encoded as text
        tokenizer.no_truncation()  # a file may hold settings of another model
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)  # ids may have gaps
        if self.vocab_size > _MOST_IDS:  # `tokenizers` lists the gaps when it is pickled
            raise ValueError(f"it has a token of id {self.vocab_size - 1}; expected ids below {_MOST_IDS}")
        special = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.bos_id = next((special[name] for name in self._BOS_NAMES if name in special), None)
        self.eos_id = next((special[name] for name in self._EOS_NAMES if name in special), None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, as exact as the file's normalisation allows."""
        ids = self._encode(text)
        if self.bos_id not in ids and self.eos_id not in ids:
            return ids
        # Unigram and word-level models hold control tokens as ordinary words: split their names first.
        return [id for piece in self._inside_control_name.split(text) for id in self._encode(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        with report_damage("decode ids"):
            return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint

    def __reduce__(self) -> tuple:
        # Rebuilt by the constructor: a pickled `tokenizers` object loses encode_special_tokens.
        return type(self), (self._tokenizer, self._fingerprint)

    def _encode(self, text: str) -> list[int]:
        # A batch of one: only batches can skip the offsets of tokens, a quarter of the time.
        with report_damage("encode a text"):
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @functools.cached_property
    def _inside_control_name(self) -> re.Pattern[str]:
        names = (self._tokenizer.id_to_token(id) for id in (self.bos_id, self.eos_id) if id is not None)
        return re.compile("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names))
