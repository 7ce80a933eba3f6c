"""Tokenizers of bytes, of sentencepiece models and of `tokenizers` files."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator

import tokenizers
from sentencepiece import SentencePieceProcessor

from lm2_jax.common.errors import UserError
from lm2_jax.tokenizer.base import digest

_MOST_IDS = 1 << 24


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
