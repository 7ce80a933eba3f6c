"""Text to token ids and back: one class or function for each `tokenizer.kind`."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import huggingface_hub
import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import read_limited
from lm2_jax.config import Config, TokenizerConfig
from lm2_jax.tokenizer.stories import StoriesTokenizer

_LONGEST_FILE = 1 << 26  # bytes; the largest in use have half as many
_MOST_IDS = 1 << 24


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer. All of them can be pickled."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it, those of control tokens included."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The control token that begins a document; None where the vocabulary has none."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The control token that ends a document; None where the vocabulary has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone. A control token's name inside the text is text like any other."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens, and ids past the vocabulary (of a padded model), are left out."""
        ...

    def fingerprint(self) -> str:
        """16 hex digits that change whenever the vocabulary or the rules do."""
        ...


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` names.

    Raises UserError when its file is missing or no model of that kind.
    """
    if config.kind == "stories":
        return StoriesTokenizer()
    if config.kind == "bytes":
        return BytesTokenizer()
    try:
        data = read_limited(Path(config.path), _LONGEST_FILE)
    except OSError as error:
        raise UserError(f"tokenizer.path: {config.path} cannot be read ({error.strerror})") from None
    try:
        if config.kind == "sentencepiece":
            return SentencePieceTokenizer(data)
        if config.kind == "tokenizers":
            with _damage_found("be loaded"):
                return HuggingFaceTokenizer(tokenizers.Tokenizer.from_buffer(data), _digest(b"tokenizers", data))
        return HuggingFaceTokenizer(convert_llama3(data), _digest(b"llama3", data))
    except UserError:
        raise
    except Exception as error:  # ours, and whatever the libraries make of a file that is none of theirs
        likely = _likely_kind(data)
        hint = f"; it looks like tokenizer.kind {likely}" if likely not in (None, config.kind) else ""
        raise UserError(f"tokenizer.path: {config.path} is no {config.kind} model: {error}{hint}") from None


def find_tokenizer(name: str) -> TokenizerConfig:
    """Settings for the tokenizer that a user calls `name`: bytes, a file of any kind, or a repository of the hub.

    Raises UserError if there is none of that name.
    """
    if name == "bytes":
        return TokenizerConfig(kind="bytes")
    path = Path(name)
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        try:
            path = Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
        except Exception as error:  # of the network, of the hub, of the cache
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"--tokenizer: {name} is no file, and the hub sends no tokenizer.json ({reason})") from None
    try:
        with path.open("rb") as file:
            kind = _likely_kind(file.read(4096))
    except OSError as error:
        raise UserError(
            f"--tokenizer: {name} cannot be read ({error.strerror}); name bytes, a file or a hub id"
        ) from None
    if kind is None:
        raise UserError(f"--tokenizer: {name} is no tokenizer.json, sentencepiece model or Llama-3 tokenizer.model")
    return TokenizerConfig(kind=kind, path=str(path))


def load_text_tokenizer(config: Config, checkpoint: str | Path) -> Tokenizer:
    """The tokenizer of a trained model, for text. Raises UserError if its config names none, or as `load_tokenizer`."""
    if not config.has_tokenizer:
        raise UserError(
            f"{checkpoint}: trained on token ids (data.source bin), and its config names no tokenizer to make ids of "
            "text; its config.yaml can name one (tokenizer: {kind: llama3, path: tokenizer.model}), and a Hugging Face "
            "directory can hold a tokenizer.json"
        )
    return load_tokenizer(config.tokenizer)


def with_vocabulary(config: Config) -> Config:
    """The config with model.vocab_size, from the tokenizer if it does not say. Raises UserError as `load_tokenizer`."""
    return config if config.model.vocab_size else check_vocabulary(config, load_tokenizer(config.tokenizer))


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab_size filled in from the tokenizer. Raises UserError if they disagree."""
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size: found {config.model.vocab_size}, but the tokenizer ({config.tokenizer.kind}"
            f"{f', {config.tokenizer.path}' if config.tokenizer.path else ''}) has {tokenizer.vocab_size} ids; "
            f"set it to {tokenizer.vocab_size} or to null"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})})


_PIECE = 1 << 14  # characters
_AROUND = 1 << 9  # characters on either side of a cut that are looked at
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


def encode_long(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text of any length, int32 [n], as of `tokenizer.encode`, which may take 400 bytes a token to work.

    The text is cut before spaces between two words. Tokenizers that see such a cut (a `tokenizers` file may put a mark
    before every text) show it at the first one, and are given the text whole.
    """
    cuts = [0]
    while (cut := _BETWEEN_WORDS.search(text, cuts[-1] + _PIECE)) is not None:
        cuts.append(cut.start())
    cuts.append(len(text))

    def encode(start: int, end: int) -> np.ndarray:
        return np.array(tokenizer.encode(text[start:end]), np.int32)

    if len(cuts) > 2:
        start, cut, end = cuts[1] - _AROUND, cuts[1], cuts[1] + _AROUND
        if not np.array_equal(encode(start, end), np.concatenate([encode(start, cut), encode(cut, end)])):
            cuts = [0, len(text)]
    return np.concatenate([encode(start, end) for start, end in itertools.pairwise(cuts)])


class BytesTokenizer:
    """UTF-8 bytes 0-255, begin 256, end 257."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes among `ids`, U+FFFD where they are not UTF-8."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return _digest(b"bytes")


class SentencePieceTokenizer:
    """A sentencepiece model, given as the bytes of its `.model` file.

    Raises RuntimeError when they are no such model.
    """

    def __init__(self, model: bytes) -> None:
        if not model:
            raise RuntimeError("the file is empty")
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:  # its text is a line of C++
            raise RuntimeError("its bytes cannot be parsed as one") from None
        self._fingerprint = _digest(b"sentencepiece", model)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = (
            None if token < 0 else token for token in (self._processor.bos_id(), self._processor.eos_id())
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; as exact as the model's normalisation allows."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self._processor.decode([int(token) for token in ids if token < self.vocab_size])

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint


@contextlib.contextmanager
def _damage_found(doing: str) -> Iterator[None]:
    """Makes a panic of Rust, which is no Exception, and what a model cannot do for want of a part, a UserError."""
    try:
        yield
    except (ValueError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"tokenizer.path: the model in the file is damaged, and cannot {doing} ({error})") from None


class HuggingFaceTokenizer:
    """A `tokenizers` object; begin and end are found among its special tokens by their usual names."""

    _BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
    _EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")

    def __init__(self, tokenizer: tokenizers.Tokenizer, fingerprint: str) -> None:
        tokenizer.encode_special_tokens = True  # their names in a text are text
        tokenizer.no_truncation()  # a file may carry the settings of another model
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
        """Ids of `text`; as exact as the file's normalisation allows."""
        ids = self._encode(text)
        if self.bos_id not in ids and self.eos_id not in ids:
            return ids
        # Unigram and word-level models hold control tokens as ordinary words: cut their names apart first.
        return [id for piece in self._inside_control_name.split(text) for id in self._encode(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        with _damage_found("decode ids"):
            return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return self._fingerprint

    def __reduce__(self) -> tuple:
        # Rebuilt by the constructor: `tokenizers` forgets encode_special_tokens when it is pickled.
        return type(self), (self._tokenizer, self._fingerprint)

    def _encode(self, text: str) -> list[int]:
        # A batch of one: only batches can do without the offsets of tokens, which take a quarter of the time.
        with _damage_found("encode a text"):
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @functools.cached_property
    def _inside_control_name(self) -> re.Pattern[str]:
        names = (self._tokenizer.id_to_token(id) for id in (self.bos_id, self.eos_id) if id is not None)
        return re.compile("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names))


# --- Llama-3's tokenizer.model -------------------------------------------------------------------------------------

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    5: "step_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
    11: "image",
}
_LLAMA3_SPECIALS = 256
_LLAMA3_LONGEST = 256  # bytes of a token, whose merging takes their square in time; Meta's longest has 128


def convert_llama3(data: bytes) -> tokenizers.Tokenizer:
    """The `tokenizers` equal of a Llama-3 `tokenizer.model`: lines "base64 rank", 128,000 of them in Meta's file.

    The 256 special tokens take the ids after the last rank, begin and end of text first. Any smaller file of the same
    form works too. Called with special tokens, the result puts begin of text first, as Hugging Face's own file does.

    Raises ValueError, with the line, when the data are not such a file.
    """
    ranks = _parse_ranks(data)
    # Greedy merging within a token never looks outside it, so the last merge that makes it alone is the only one that
    # ever makes it. Tokens that merging cannot reach still match whole words (ignore_merges).
    merges = [split for token in ranks if (split := _last_merge(token, ranks))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={_as_letters(token): rank for token, rank in ranks.items()},
            merges=[(_as_letters(left), _as_letters(right)) for left, right in merges],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = (f"reserved_special_token_{number}" for number in itertools.count())
    names = [f"<|{_LLAMA3_NAMED.get(number) or next(reserved)}|>" for number in range(_LLAMA3_SPECIALS)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]} $B:1", special_tokens=[(names[0], len(ranks))]
    )
    return tokenizer


def _parse_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = _parse_rank(line)
            if rank != len(ranks):
                raise ValueError(f"has rank {rank}; expected {len(ranks)}, as ranks count up from 0")
            if len(token) > _LLAMA3_LONGEST:
                raise ValueError(f"has a token of {len(token)} bytes; expected {_LLAMA3_LONGEST} at most")
            if token in ranks:
                raise ValueError(f"repeats the token of rank {ranks[token]}")
        except ValueError as error:
            raise ValueError(f"line {number}, {line[:60].decode(errors='replace')!r}, {error}") from None
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 single bytes have no rank, the first is {missing[0]:#04x}")
    return ranks


def _parse_rank(line: bytes) -> tuple[bytes, int]:
    try:
        encoded, rank = line.split()
        return base64.b64decode(encoded, validate=True), int(rank)
    except ValueError:
        raise ValueError("is not 'base64 rank'") from None


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that byte-pair merging leaves of `token` before its last merge; None if it never gets there."""
    parts = [token[i : i + 1] for i in range(len(token))]
    never = len(ranks)
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, never) for left, right in itertools.pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest == never:
            return None
        first = pair_ranks.index(lowest)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def byte_letters() -> dict[int, int]:
    """The letter that byte-level BPE (GPT-2) writes for each byte: printable Latin-1 itself, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}


_BYTE_LETTERS = byte_letters()


def _as_letters(token: bytes) -> str:
    return token.decode("latin-1").translate(_BYTE_LETTERS)


# --- Files ---------------------------------------------------------------------------------------------------------


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _likely_kind(data: bytes) -> str | None:
    """The kind whose files begin like `data`."""
    if data.lstrip().startswith(b"{"):
        return "tokenizers"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return "llama3"
    if data.startswith(b"\n") and b"<unk>" in data[:64]:  # a protobuf whose first field is a piece
        return "sentencepiece"
    return None
