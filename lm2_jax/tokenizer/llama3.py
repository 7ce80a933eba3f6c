"""Llama 3's `tokenizer.model`, ranks of byte-level BPE, as a `tokenizers` object."""

from __future__ import annotations

import base64
import itertools

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

LLAMA3_WORDS = (  # one pattern, which cuts a text into words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_NAMED = {
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
_SPECIALS = 256
_LONGEST = 256  # bytes of a token, as merging takes quadratic time; Meta's longest has 128


def convert_llama3(data: bytes) -> tokenizers.Tokenizer:
    """Converts a Llama-3 `tokenizer.model`, lines of "base64 rank" (128,000 in Meta's file), to a `tokenizers` object.

    The 256 special tokens take the ids after the last rank, begin and end of text first. Smaller files of the same form
    work too. If asked for special tokens, the result puts begin of text first, like Hugging Face's own file.

    Raises ValueError, with the line, if the data are not such a file.
    """
    ranks = _parse_ranks(data)
    # Greedy merging within a token never looks outside it, so a token has one last merge everywhere. Tokens that
    # merging cannot reach still match whole words (ignore_merges).
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
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = (f"reserved_special_token_{number}" for number in itertools.count())
    names = [f"<|{_NAMED.get(number) or next(reserved)}|>" for number in range(_SPECIALS)]
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
            if len(token) > _LONGEST:
                raise ValueError(f"has a token of {len(token)} bytes; expected {_LONGEST} at most")
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
    """The two parts of `token` before the last merge of byte-pair encoding; None if merging never reaches it."""
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
    """The letter for each byte in byte-level BPE (GPT-2): printable Latin-1 as itself, others from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}


_BYTE_LETTERS = byte_letters()


def _as_letters(token: bytes) -> str:
    return token.decode("latin-1").translate(_BYTE_LETTERS)
