"""The tokenizer of each `tokenizer.kind`, their interface, and the encoding of texts of any length."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Protocol

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor

from lm2_jax.common.errors import UserError, warn_once
from lm2_jax.tokenizer.special_tokens import SpecialTokens, Vocabulary, find_special_tokens, surrounding_ids

_MOST_IDS = 1 << 24
_CHUNK = 1 << 14  # characters
_AROUND = 1 << 9  # characters on each side of a cut that are compared
FindSpecialTokens = Callable[[Vocabulary], SpecialTokens]
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


class Tokenizer(Protocol):
    """The interface of all tokenizers. They can be pickled."""

    @property
    def vocab_size(self) -> int:
        """Upper bound of all ids, those of control tokens included."""
        ...

    @property
    def special(self) -> SpecialTokens:
        """The control tokens around a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without those around it; `tokenizer.control_tokens` says what names of control tokens become.

        They are plain text unless it says otherwise.
        """
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt that a chat template made: names of control tokens inside it become those tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens, and ids beyond the vocabulary (of a padded model), are skipped."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that change whenever the vocabulary or the rules do."""
        ...


def fingerprint(
    chunks: Iterable[bytes], vocabulary: Vocabulary, special: SpecialTokens, control_tokens: str = "text"
) -> str:
    """16 hex digits of a SHA-256 checksum, for `Tokenizer.fingerprint`.

    They are those of `chunks` alone where documents begin and end as the usual names have it, and control tokens inside
    a text are text: so it was before there were settings for them.
    """
    usual = find_special_tokens(dataclasses.replace(vocabulary, prefix_ids=None))
    rules = (special.prefix_ids, special.eos_id, control_tokens)
    if rules != (usual.prefix_ids, usual.eos_id, "text"):
        chunks = (*chunks, repr(rules).encode())
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


def prompt_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text to be continued, int32 [n]: what the tokenizer puts before every text, then the text."""
    return np.concatenate([np.array(tokenizer.special.prefix_ids, np.int32), encode_long(tokenizer, text)])


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
    unk_id = 0
    _CONTROL: ClassVar = {"<unk>": 0, "<bos>": 1, "<eos>": 2}

    def __init__(self, find: FindSpecialTokens = find_special_tokens) -> None:
        self.words = (*self._CONTROL, *_WORDS.split())
        vocabulary = Vocabulary(self._CONTROL, self._CONTROL)
        self.special = find(vocabulary)
        self._fingerprint = fingerprint(["\n".join(self.words).encode()], vocabulary, self.special)
        self._ids = {word: i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words and marks of a text, without <bos> and <eos>; an unknown word or mark is <unk>."""
        return [self._ids.get(word, self.unk_id) for word in re.findall(self.PATTERN, text.lower())]

    encode_prompt = encode

    def decode(self, ids: Iterable[int]) -> str:
        """Lower-case text, without spaces before marks; <bos>, <eos> and ids beyond the vocabulary are skipped."""
        words = [self.words[i] for i in ids if i < self.vocab_size and i not in (1, 2)]
        return _SPACE_BEFORE_MARK.sub("", " ".join(words))

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint


class BytesTokenizer:
    """UTF-8 bytes as ids 0-255; 256 begins a document and 257 ends it."""

    vocab_size = 258
    _CONTROL: ClassVar = {"<bos>": 256, "<eos>": 257}

    def __init__(self, find: FindSpecialTokens = find_special_tokens) -> None:
        vocabulary = Vocabulary(self._CONTROL, self._CONTROL)
        self.special = find(vocabulary)
        self._fingerprint = fingerprint([b"bytes"], vocabulary, self.special)

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())

    encode_prompt = encode

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes among `ids`, with U+FFFD for bytes that are not UTF-8."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint


class SentencePieceTokenizer:
    """A sentencepiece model, given as the bytes of its `.model` file.

    Raises RuntimeError if they are not such a model.
    """

    def __init__(self, model: bytes, find: FindSpecialTokens = find_special_tokens) -> None:
        if not model:
            raise RuntimeError("the file is empty")
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:  # whose message is a line of C++
            raise RuntimeError("its bytes cannot be parsed as one") from None
        self.vocab_size = self._processor.vocab_size()
        vocabulary = self._vocabulary()
        self.special = find(vocabulary)
        self._fingerprint = fingerprint([b"sentencepiece", model], vocabulary, self.special)

    def _vocabulary(self) -> Vocabulary:
        sp = self._processor
        ids = {sp.id_to_piece(id): id for id in range(self.vocab_size)}
        control = {name: id for name, id in ids.items() if sp.is_control(id) or sp.is_unknown(id)}
        bos_id, eos_id = (None if id < 0 else id for id in (sp.bos_id(), sp.eos_id()))
        return Vocabulary(ids, control, None, bos_id, eos_id, is_sentencepiece=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, as exact as the model's normalisation allows."""
        return self._processor.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """See `Tokenizer`. Raises UserError: a sentencepiece model never reads control tokens in a text."""
        raise UserError(
            "tokenizer.kind sentencepiece cannot read a chat's control tokens; use the model's tokenizer.json"
        )

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
    """A `tokenizers` object.

    Args:
      chunks: what its fingerprint is made of.
      control_tokens: as in the settings.
      find: finds the tokens around a text.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        chunks: Sequence[bytes],
        control_tokens: str = "text",
        find: FindSpecialTokens = find_special_tokens,
    ) -> None:
        tokenizer.no_truncation()  # a file may hold settings of another model
        tokenizer.no_padding()
        ids = tokenizer.get_vocab()
        self.vocab_size = 1 + max(ids.values(), default=-1)  # ids may have gaps
        if self.vocab_size > _MOST_IDS:  # `tokenizers` lists the gaps when it is pickled
            raise ValueError(f"it has a token of id {self.vocab_size - 1}; expected ids below {_MOST_IDS}")
        control = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        around = surrounding_ids(tokenizer.post_processor)
        vocabulary = Vocabulary(ids, control, None if around is None else around[0])
        self.special = find(vocabulary)
        self._tokenizer, self._control, self._control_tokens = tokenizer, control, control_tokens
        self._fingerprint = fingerprint(chunks, vocabulary, self.special, control_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, as exact as the file's normalisation allows. Warns of control tokens that become text."""
        if self._control_tokens == "token":
            return self.encode_prompt(text)
        if found := self._name.search(text):
            warn_once(
                f"a text holds the name of a control token, {found[0]}, which is read as text, in pieces; "
                "tokenizer.control_tokens=token reads it as the token; leave it for texts that you do not trust"
            )
        ids = self._encode(text, as_text=True)
        if not found or not self._ids_of_control.intersection(ids):
            return ids
        # Unigram and word-level models hold control tokens as ordinary words: split their names first.
        return [id for piece in self._inside_name.split(text) for id in self._encode(piece, as_text=True)]

    def encode_prompt(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self._encode(text, as_text=False)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        with report_damage("decode ids"):
            return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint

    def _encode(self, text: str, as_text: bool) -> list[int]:
        # A batch of one: only batches can skip the offsets of tokens, a quarter of the time.
        with report_damage("encode a text"):
            self._tokenizer.encode_special_tokens = as_text  # each time: pickling loses it
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @functools.cached_property
    def _ids_of_control(self) -> frozenset[int]:
        return frozenset(self._control.values())

    @functools.cached_property
    def _name(self) -> re.Pattern[str]:
        """Matches the names of control tokens, longest first; nothing where there are none."""
        return re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) or r"(?!)")

    @functools.cached_property
    def _inside_name(self) -> re.Pattern[str]:
        """Matches the place after the first letter of every name."""
        return re.compile("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in self._control))
