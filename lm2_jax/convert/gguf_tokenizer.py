"""The tokenizer in the settings of a GGUF file, as the small files of a Hugging Face directory.

Two kinds (`tokenizer.ggml.model`): gpt2, byte-level BPE with merges and a named rule to cut text into words; and llama,
sentencepiece's BPE, whose merges follow from the tokens' scores. Where a file says nothing, llama.cpp's defaults hold.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import short_repr
from lm2_jax.convert.sentencepiece_model import merges_of
from lm2_jax.tokenizer.llama3 import LLAMA3_WORDS

_KEYS = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type; others: unused, byte
_LONGEST = 256  # characters of a token that is merged: its merges take quadratic time
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# Patterns that cut the text one after another, by tokenizer.ggml.pre
_WORDS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (LLAMA3_WORDS,)),
}
# Control tokens that end a text by their names
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>")
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # theirs: {name}_token_id
_LLAMA_IDS = {"bos": 1, "eos": 2, "unk": 0}  # of model llama, where the file names none


def write_tokenizer(settings: Mapping[str, Any], directory: Path, where: Path) -> dict[str, Any]:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    Returns bos_token_id, eos_token_id (a list if there are several) and pad_token_id, of which some may be missing.
    Raises UserError for a tokenizer that is damaged or of another kind. where: the file, for messages.
    """
    try:
        vocabulary, template = _Vocabulary.read(settings), _chat_template(settings)
        tokenizer = _build(vocabulary)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.adds["bos"],
        "add_eos_token": vocabulary.adds["eos"],
        **{f"{name}_token": vocabulary.tokens[id] for name, id in vocabulary.ids.items()},
        **({"chat_template": template} if template else {}),
    }
    ids: dict[str, Any] = {f"{name}_token_id": id for name, id in vocabulary.ids.items() if name in ("bos", "pad")}
    if ends := vocabulary.ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    tokenizer.save(str(directory / "tokenizer.json"))
    for file, values in (("tokenizer_config.json", config), ("generation_config.json", ids)):
        (directory / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return ids


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """The settings, checked.

    Attributes:
      model: gpt2 or llama.
      words: gpt2: patterns that cut the text into words.
      tokens: by id.
      types: of the tokens.
      merges: gpt2: "left right", the first merged first.
      scores: llama: of the tokens; the pair that makes the highest one is merged first.
      ids: of bos, eos, pad and unk, as far as they are named.
      ends: ids that end a text, eos first.
      adds: whether bos and eos are put around a text.
      space_prefix: llama: a space is put before a text.
      ignore_merges: gpt2: a word that is a token is never cut.
    """

    model: str
    words: tuple[str, ...]
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    ends: list[int]
    adds: dict[str, bool]
    space_prefix: bool
    ignore_merges: bool

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> _Vocabulary:
        """From the settings of a file. Raises UserError with the key that is wrong."""
        is_llama = _one_of(settings, "model", ("gpt2", "llama")) == "llama"
        tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(_list(settings, "tokens", str, None))]
        if not tokens or len(set(tokens)) < len(tokens):
            raise UserError(f"{_KEYS}tokens: found {len(tokens)}, {len(set(tokens))} of them different")
        types = _list(settings, "token_type", int, len(tokens), default=[_NORMAL] * len(tokens))
        pre = "default" if is_llama else _one_of(settings, "pre", tuple(_WORDS))
        is_llama3 = _WORDS[pre] == (LLAMA3_WORDS,)
        ids = {name: id for name, id in _LLAMA_IDS.items() if is_llama and id < len(tokens)}
        named = {name: _id(settings, f"{theirs}_token_id", tokens) for name, theirs in _SPECIAL.items()}
        ids |= {name: id for name, id in named.items() if id is not None}
        adds = {"bos": _truth(settings, "add_bos_token", is_llama or is_llama3)}
        adds["eos"] = _truth(settings, "add_eos_token", False)
        unnamed = [name for name, adds_it in adds.items() if adds_it and name not in ids]
        if unnamed:
            raise UserError(f"{_KEYS}{unnamed[0]}_token_id: is missing, but add_{unnamed[0]}_token is true")
        ends = [ids.get("eos"), *(_id(settings, f"{name}_token_id", tokens) for name in ("eot", "eom"))]
        ends += [id for id, name in enumerate(tokens) if types[id] == _CONTROL and name in _ENDS]
        return cls(
            model="llama" if is_llama else "gpt2",
            words=_WORDS[pre],
            tokens=tokens,
            types=types,
            merges=[] if is_llama else _list(settings, "merges", str, None),
            scores=_list(settings, "scores", float, len(tokens)) if is_llama else [],
            ids=ids,
            ends=[id for id in dict.fromkeys(ends) if id is not None],
            adds=adds,
            space_prefix=_truth(settings, "add_space_prefix", True),
            ignore_merges=is_llama3,
        )


def _build(vocabulary: _Vocabulary) -> Tokenizer:
    try:
        tokenizer = _llama(vocabulary) if vocabulary.model == "llama" else _gpt2(vocabulary)
        for special, types in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
            names = (name for name, type in zip(vocabulary.tokens, vocabulary.types, strict=True) if type in types)
            tokenizer.add_tokens([AddedToken(name, normalized=False, special=special) for name in names])
    except UserError:
        raise
    except Exception as error:  # tokenizers raises many types
        raise UserError(f"{_KEYS}model: {vocabulary.model}: its tokens and merges do not fit ({error})") from None
    around = {
        name: (vocabulary.tokens[vocabulary.ids[name]],) if adds else () for name, adds in vocabulary.adds.items()
    }
    if any(around.values()):
        first, second = ([*around["bos"], f"${text}", *around["eos"]] for text in "AB")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first,
            pair=[*first, *(f"{piece}:1" for piece in second)],
            special_tokens=[(name, tokenizer.token_to_id(name)) for names in around.values() for name in names],
        )
    return tokenizer


def _gpt2(vocabulary: _Vocabulary) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=vocabulary.ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in vocabulary.words]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # adds no token
    return tokenizer


def _llama(vocabulary: _Vocabulary) -> Tokenizer:
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.tokens[vocabulary.ids["unk"]] if "unk" in vocabulary.ids else None
    merges = _merges(vocabulary, ids)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if vocabulary.space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(vocabulary: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, those of the highest score first, as Hugging Face orders them."""
    normal = {token for token, type in zip(vocabulary.tokens, vocabulary.types, strict=True) if type == _NORMAL}
    if longest := [token for token in normal if len(token) > _LONGEST]:
        raise UserError(f"{_KEYS}tokens: {short_repr(longest[0])} has over {_LONGEST} characters")
    return merges_of({token: vocabulary.scores[ids[token]] for token in normal})


def _chat_template(settings: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The template, or several by name; None if there is none."""
    key = "tokenizer.chat_template"
    templates = {name: text for name, text in settings.items() if re.fullmatch(rf"{key}(\..+)?", name)}
    if wrong := [name for name, text in templates.items() if not isinstance(text, str)]:
        raise UserError(f"{wrong[0]}: found {short_repr(templates[wrong[0]])}; expected a text")
    named = {name.removeprefix(key)[1:] or "default": text for name, text in templates.items()}
    if named.keys() <= {"default"}:
        return named.get("default")
    return [{"name": name, "template": text} for name, text in named.items()]


# --- Settings ------------------------------------------------------------------------------------------------------


def _one_of(settings: Mapping[str, Any], name: str, supported: tuple[str, ...]) -> str:
    value = settings.get(_KEYS + name)
    if value not in supported:
        raise UserError(f"{_KEYS}{name}: found {short_repr(value)}; supported are {', '.join(supported)}")
    return value


def _truth(settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(_KEYS + name, default)
    if not isinstance(value, bool):
        raise UserError(f"{_KEYS}{name}: found {short_repr(value)}; expected true or false")
    return value


def _id(settings: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    value = settings.get(_KEYS + name)
    if value is None or (type(value) is int and 0 <= value < len(tokens)):
        return value
    raise UserError(f"{_KEYS}{name}: found {short_repr(value)}; expected the id of one of {len(tokens)} tokens")


def _list(
    settings: Mapping[str, Any], name: str, kind: type, length: int | None, default: list | None = None
) -> list[Any]:
    values = settings.get(_KEYS + name, default)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{_KEYS}{name}: found {short_repr(values)}; expected a list of {kind.__name__}")
    if length not in (None, len(values)):
        raise UserError(f"{_KEYS}{name}: found {len(values)} values for {length} tokens")
    return values
