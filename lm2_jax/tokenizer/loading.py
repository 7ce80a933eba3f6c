"""Tokenizers by their settings and by their names, and vocabularies that fit a model."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import re
from pathlib import Path

import huggingface_hub
import tokenizers

from lm2_jax.common.errors import UserError, warn_once
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.common.untrusted import read_limited
from lm2_jax.config import Config, TokenizerConfig
from lm2_jax.tokenizer.kinds import (
    BytesTokenizer,
    FindSpecialTokens,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    StoriesTokenizer,
    Tokenizer,
    report_damage,
)
from lm2_jax.tokenizer.llama3 import convert_llama3
from lm2_jax.tokenizer.origin import FILES, Origin, origin_beside, origin_of_model
from lm2_jax.tokenizer.special_tokens import find_special_tokens

_LONGEST_FILE = 1 << 26  # bytes; the largest in use have half as many


def load_tokenizer(config: TokenizerConfig, origin: Origin | None = None) -> Tokenizer:
    """The tokenizer that `config` names.

    origin: the small files that came with the model; None: those beside the tokenizer's file.
    Raises UserError if its file is missing or not a model of that kind. Warns if it names no end token.
    """
    own = None if config.path is None else origin or origin_beside(config.path)
    find = functools.partial(find_special_tokens, settings=config, origin=own)
    if config.kind == "stories":
        return StoriesTokenizer(find)
    if config.kind == "bytes":
        return BytesTokenizer(find)
    tokenizer = _load_file(config, find)
    if tokenizer.special.eos_id is None and config.eos_token is None and multiprocessing.parent_process() is None:
        warn_once(
            f"tokenizer.path: {config.path} names no end token, and no file beside it does: documents run into each "
            "other, and generated texts end by their length alone; name one in tokenizer.eos_token, or set it to ''"
        )
    return tokenizer


def _load_file(config: TokenizerConfig, find: FindSpecialTokens) -> Tokenizer:
    try:
        data = read_limited(to_path(config.path, "tokenizer.path"), _LONGEST_FILE)
    except OSError as error:
        raise UserError(f"tokenizer.path: {config.path} cannot be read ({error.strerror})") from None
    try:
        if config.kind == "sentencepiece":
            return SentencePieceTokenizer(data, find)
        if config.kind == "tokenizers":
            with report_damage("be loaded"):
                tokenizer = tokenizers.Tokenizer.from_buffer(data)
        else:
            tokenizer = convert_llama3(data)
        return HuggingFaceTokenizer(tokenizer, (config.kind.encode(), data), config.control_tokens, find)
    except UserError:
        raise
    except Exception as error:  # ours, and whatever the libraries raise for a file that is not theirs
        likely = _likely_kind(data)
        hint = f"; it looks like tokenizer.kind {likely}" if likely not in (None, config.kind) else ""
        raise UserError(f"tokenizer.path: {config.path} is not a {config.kind} model: {error}{hint}") from None


def find_tokenizer(name: str) -> TokenizerConfig:
    """Settings for the tokenizer of a name: "bytes", a file of any kind, or a repository of the Hugging Face hub.

    Raises UserError if there is no such tokenizer.
    """
    if name == "bytes":
        return TokenizerConfig(kind="bytes")
    path = to_path(name, "--tokenizer")
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        try:
            path = Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
            _download_origin(name)
        except Exception as error:  # of the network, of the hub, of the cache
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"--tokenizer: {name} is not a file, and the hub has no such tokenizer.json ({reason})"
            ) from None
    try:
        with path.open("rb") as file:
            kind = _likely_kind(file.read(4096))
    except OSError as error:
        raise UserError(
            f"--tokenizer: {name} cannot be read ({error.strerror}); give bytes, a file or a hub id"
        ) from None
    if kind is None:
        raise UserError(
            f"--tokenizer: {name} is neither a tokenizer.json nor a sentencepiece model nor a Llama-3 tokenizer.model"
        )
    return TokenizerConfig(kind=kind, path=str(path))


def _download_origin(name: str) -> None:
    """Downloads the small files of a repository beside its tokenizer.json, those that it has."""
    for file in FILES:
        with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download(name, file)


def load_text_tokenizer(config: Config, checkpoint: str | AnyPath) -> Tokenizer:
    """The tokenizer of a trained model. Raises UserError if its config names none, or as `load_tokenizer` does."""
    if not config.has_tokenizer:
        raise UserError(
            f"{checkpoint}: trained on token ids (data.source bin), and its config names no tokenizer for text; "
            "name one in its config.yaml (tokenizer: {kind: llama3, path: tokenizer.model}), or put a tokenizer.json "
            "into a Hugging Face directory"
        )
    return load_tokenizer(config.tokenizer, origin_of_model(config.tokenizer, checkpoint))


def with_vocabulary(config: Config) -> Config:
    """The config with model.vocab_size set, from the tokenizer if needed. Raises UserError as `load_tokenizer` does."""
    return config if config.model.vocab_size else check_vocabulary(config, load_tokenizer(config.tokenizer))


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab_size set, from the tokenizer if it is null.

    A larger one is kept, as many embedding tables are padded. Raises UserError for one that has too few ids.
    """
    model, ids = config.model, tokenizer.vocab_size
    if model.vocab_size is None:
        return config.model_copy(update={"model": model.model_copy(update={"vocab_size": ids})})
    if model.vocab_size < ids:
        raise UserError(
            f"model.vocab_size: found {model.vocab_size}, but the tokenizer ({config.tokenizer.kind}"
            f"{f', {config.tokenizer.path}' if config.tokenizer.path else ''}) has {ids} ids; "
            f"set it to {ids}, to null or, for a padded embedding table, to more"
        )
    return config


def _likely_kind(data: bytes) -> str | None:
    """The tokenizer.kind whose files begin like `data`; None if there is none."""
    if data.lstrip().startswith(b"{"):
        return "tokenizers"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return "llama3"
    if data.startswith(b"\n") and b"<unk>" in data[:64]:  # a protobuf whose first field is a piece
        return "sentencepiece"
    return None
