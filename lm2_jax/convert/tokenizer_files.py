"""The tokenizer's files of a Hugging Face directory, made from ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lm2_jax.common.errors import warn_once
from lm2_jax.common.storage import to_path
from lm2_jax.common.trees import copy_file
from lm2_jax.config import Config
from lm2_jax.convert.sentencepiece_model import convert_sentencepiece
from lm2_jax.tokenizer import (
    Origin,
    StoriesTokenizer,
    byte_letters,
    convert_llama3,
    load_tokenizer,
    surrounding_ids,
)


def special_ids(config: Config, origin: Origin | None) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list where several tokens end a text) and pad_token_id, those that there are."""
    if not config.has_tokenizer:
        return {}
    special = load_tokenizer(config.tokenizer, origin).special
    ends = special.stop_ids[0] if len(special.stop_ids) == 1 else list(special.stop_ids) or None
    ids = {"bos_token_id": special.bos_id, "eos_token_id": ends, "pad_token_id": special.pad_id}
    return {name: id for name, id in ids.items() if id is not None}


def write_generation(ids: Mapping[str, Any], origin: Origin | None, directory: Path) -> None:
    """Writes generation_config.json: that of the model's own files, with these ids where it has others."""
    name = "generation_config.json"
    own = origin.json(name) if origin else {}
    needed = {key: id for key, id in ids.items() if key in own or key == "eos_token_id"}
    if own and needed.items() <= own.items():
        origin.copy_file(name, directory)
        return
    settings = own | needed if own else {"_from_model_config": True, **ids}
    (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(config: Config, origin: Origin | None, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template; beside them a sentencepiece tokenizer.model.

    A sentencepiece model that tokenizer.json cannot express is all there is of it, with a warning.
    """
    if origin is not None:
        origin.copy_file("chat_template.jinja", directory)
    if not config.has_tokenizer:
        return
    kind, path = config.tokenizer.kind, config.tokenizer.path
    if kind == "sentencepiece":
        copy_file(to_path(path), directory / "tokenizer.model")
    ours = load_tokenizer(config.tokenizer, origin)
    tokenizer = _MAKE[kind](path)
    if tokenizer is None:
        warn_once(f"{path}: tokenizer.json cannot express this sentencepiece model; use sentencepiece to read text")
        return
    if _puts_around(tokenizer, ours.special.prefix_ids) or kind != "tokenizers":
        tokenizer.save(str(directory / "tokenizer.json"))
    else:
        copy_file(to_path(path), directory / "tokenizer.json")
    named = {"bos_token": ours.special.bos_id, "eos_token": ours.special.eos_id, "pad_token": ours.special.pad_id}
    settings = {
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in _kept(origin).items() if key not in named},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        **{key: tokenizer.id_to_token(id) for key, id in named.items() if id is not None},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _kept(origin: Origin | None) -> dict[str, Any]:
    """The model's own tokenizer settings, but for those that choose code or that tokenizer.json has."""
    settings = origin.json("tokenizer_config.json") if origin else {}
    return {key: value for key, value in settings.items() if key not in ("auto_map", "add_bos_token", "add_eos_token")}


def _puts_around(tokenizer: Tokenizer, prefix_ids: Sequence[int]) -> bool:
    """Makes a tokenizer put these tokens before every text, and none after it; True if that changed anything."""
    limited = tokenizer.truncation is not None or tokenizer.padding is not None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if (surrounding_ids(tokenizer.post_processor) or ((), ())) == (tuple(prefix_ids), ()):
        return limited
    names = [tokenizer.id_to_token(id) for id in prefix_ids]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", *names, "$B:1"],
        special_tokens=list(zip(names, prefix_ids, strict=True)),
    )
    return True


def _tokenizers(path: str) -> Tokenizer:
    return Tokenizer.from_buffer(to_path(path).read_bytes())


def _sentencepiece(path: str) -> Tokenizer | None:
    return convert_sentencepiece(to_path(path).read_bytes())


def _llama3(path: str) -> Tokenizer:
    return convert_llama3(to_path(path).read_bytes())


def _bytes(_: None) -> Tokenizer:
    """A token for every byte, then <bos> and <eos>."""
    letters = byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={chr(letters[byte]): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_control(name) for name in ("<bos>", "<eos>")])
    return tokenizer


def _stories(_: None) -> Tokenizer:
    """Lower-case words and marks."""
    ours = StoriesTokenizer()
    vocabulary = {word: id for id, word in enumerate(ours.words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=ours.words[ours.unk_id]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ours.PATTERN), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([_control(name) for name in ("<bos>", "<eos>")])
    return tokenizer


def _control(name: str) -> AddedToken:
    return AddedToken(name, normalized=False, special=True)


_MAKE = {
    "bytes": _bytes,
    "stories": _stories,
    "llama3": _llama3,
    "tokenizers": _tokenizers,
    "sentencepiece": _sentencepiece,
}
