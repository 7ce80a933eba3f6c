"""The tokenizer's files of a Hugging Face directory, made from ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lm2_jax.config import Config
from lm2_jax.data.lexicon import StoriesTokenizer
from lm2_jax.tokenizer import BytesTokenizer, byte_letters, convert_llama3, load_tokenizer


def special_ids(config: Config) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id (padding is masked, so any id will do: the end's)."""
    if config.data.source == "bin":
        return {}
    tokenizer = load_tokenizer(config.tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    return {name: id for name, id in ids.items() if id is not None}


def write_tokenizer(config: Config, directory: Path) -> None:
    """Writes tokenizer.json (or sentencepiece's tokenizer.model) and tokenizer_config.json; token shards have none."""
    if config.data.source == "bin":
        return
    kind, file = config.tokenizer.kind, directory / "tokenizer.json"
    settings: dict[str, Any] = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    if kind == "sentencepiece":
        shutil.copyfile(config.tokenizer.path, directory / "tokenizer.model")
        settings["tokenizer_class"] = "LlamaTokenizer"
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if kind == "tokenizers":
            shutil.copyfile(config.tokenizer.path, file)
        else:
            make = {"bytes": _bytes, "stories": _stories, "llama3": lambda: _llama3(config.tokenizer.path)}
            make[kind]().save(str(file))
        written = Tokenizer.from_file(str(file))
        for name, id in special_ids(config).items():
            settings[name.removesuffix("_id")] = written.id_to_token(id)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _llama3(path: str) -> Tokenizer:
    return convert_llama3(Path(path).read_bytes())


def _bytes() -> Tokenizer:
    """Every byte a token, and begin and end after them."""
    letters = byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={chr(letters[byte]): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_begin(tokenizer, {"<bos>": BytesTokenizer.bos_id, "<eos>": BytesTokenizer.eos_id})


def _stories() -> Tokenizer:
    """Lower-case words and marks."""
    ours = StoriesTokenizer()
    vocabulary = {word: id for id, word in enumerate(ours.words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=ours.words[ours.unk_id]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ours.PATTERN), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _with_begin(tokenizer, {"<bos>": ours.bos_id, "<eos>": ours.eos_id})


def _with_begin(tokenizer: Tokenizer, special: dict[str, int]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    begin = next(iter(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B:1", special_tokens=[(begin, special[begin])]
    )
    return tokenizer
