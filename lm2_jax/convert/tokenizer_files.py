"""The tokenizer's files of a Hugging Face directory, made from ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lm2_jax.config import Config
from lm2_jax.tokenizer import StoriesTokenizer, byte_letters, convert_llama3, load_tokenizer


def special_ids(config: Config) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id (padding is masked, so any id will do: the end's)."""
    if not config.has_tokenizer:
        return {}
    tokenizer = load_tokenizer(config.tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    return {name: id for name, id in ids.items() if id is not None}


def write_tokenizer(config: Config, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json; for sentencepiece, which they cannot express, only its model."""
    if not config.has_tokenizer:
        return
    kind = config.tokenizer.kind
    if kind == "sentencepiece":
        shutil.copyfile(config.tokenizer.path, directory / "tokenizer.model")
        return
    ids = special_ids(config)
    make = {"bytes": _bytes, "stories": _stories, "llama3": _llama3, "tokenizers": _tokenizers}
    tokenizer = make[kind](config.tokenizer.path)
    bos_id = ids.get("bos_token_id")
    if bos_id is not None and tokenizer.post_processor is None:  # documents begin with it
        name = tokenizer.id_to_token(bos_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B:1", special_tokens=[(name, bos_id)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): tokenizer.id_to_token(id) for name, id in ids.items()},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _tokenizers(path: str) -> Tokenizer:
    return Tokenizer.from_file(path)


def _llama3(path: str) -> Tokenizer:
    return convert_llama3(Path(path).read_bytes())


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
    tokenizer.add_special_tokens([_control(ours.words[id]) for id in (ours.bos_id, ours.eos_id)])
    return tokenizer


def _control(name: str) -> AddedToken:
    return AddedToken(name, normalized=False, special=True)
