"""The small files that come with a pretrained model: what they say about its texts, and how they travel.

Hugging Face keeps them beside the weights; a converted directory, a prepared data set and a run keep them in `origin/`.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import UserError, warn_once
from lm2_jax.common.local_copies import local_tree
from lm2_jax.common.storage import AnyPath, StorePath, to_path
from lm2_jax.common.untrusted import LONGEST_JSON, read_json, read_limited, resolve_inside, short_repr
from lm2_jax.config import TokenizerConfig

DIRECTORY = "origin"
_TEMPLATE = "chat_template.jinja"
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", _TEMPLATE)
_COMPLETE = ".complete"  # in a store, where a directory comes file by file
CARD = "README.md"  # the model card, which states the licence
_TOP_K = 50  # of transformers, where do_sample is on and top_k not given
_NEUTRAL = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}


@dataclasses.dataclass(frozen=True)
class Origin:
    """A directory with some of `FILES`, and perhaps a model card. Its methods raise UserError for a damaged file."""

    directory: Path

    def token(self, key: str) -> str | None:
        """The name of "bos_token", "eos_token" or "pad_token" in the tokenizer's files."""
        for settings in (self.json("tokenizer_config.json"), self.json("special_tokens_map.json")):
            value = settings.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def ids(self, key: str) -> list[int]:
        """The ids under "eos_token_id" and its likes in generation_config.json, or else in config.json."""
        for settings in (self.generation, self.json("config.json")):
            value = settings.get(key)
            ids = value if isinstance(value, list) else [value]
            if ids and all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
                return ids
        return []

    @property
    def adds_bos(self) -> bool:
        """True unless tokenizer_config.json says that texts begin without the begin token."""
        return self.json("tokenizer_config.json").get("add_bos_token") is not False

    @property
    def generation(self) -> dict[str, Any]:
        """The settings in generation_config.json."""
        return self.json("generation_config.json")

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling as generation_config.json has it: temperature, top_k and top_p; empty where it samples nothing."""
        settings = self.generation
        if settings.get("do_sample") is not True:
            return {}
        where = self.directory / "generation_config.json"
        strange = [f"{k} {settings[k]!r}" for k, off in _NEUTRAL.items() if settings.get(k) not in (None, off)]
        if strange:
            warn_once(f"{where}: {', '.join(strange)}: not supported here, and left out")
        found = {
            "temperature": settings.get("temperature", 1.0),
            "top_k": settings.get("top_k", _TOP_K) or None,  # 0: all
            "top_p": None if settings.get("top_p") in (None, 1, 1.0) else settings["top_p"],
        }
        for key, value in found.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"{where}: {key}: found {short_repr(value)}; expected a number")
        return found

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into a prompt; None if the model has none."""
        if self.has(_TEMPLATE):
            try:
                return read_limited(resolve_inside(self.directory, _TEMPLATE), LONGEST_JSON).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{self.directory / _TEMPLATE}: cannot be read ({error})") from None
        value = self.json("tokenizer_config.json").get("chat_template")
        if isinstance(value, list):  # several, by name
            value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}.get("default")
        return value if isinstance(value, str) else None

    def copy_to(self, directory: AnyPath) -> None:
        """Copies the files into an `origin/` in `directory`, all or none, unless one is there."""
        target = directory / DIRECTORY
        if isinstance(target, StorePath):
            if not (target / _COMPLETE).exists():
                for name in filter(self.has, (*FILES, CARD)):
                    (target / name).upload(resolve_inside(self.directory, name))
                (target / _COMPLETE).write_text("")
            return
        if target.exists():
            return
        partial = directory / f".{DIRECTORY}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in (*FILES, CARD):
            self.copy_file(name, partial)
        partial.rename(target)

    def copy_file(self, name: str, directory: Path) -> None:
        """Copies one of the files into a directory, if it is there."""
        if self.has(name):
            shutil.copyfile(resolve_inside(self.directory, name), directory / name)

    def has(self, name: str) -> bool:
        """True if that file is there."""
        return (self.directory / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty if the file is not there."""
        return read_json(self.directory / name) if self.has(name) else {}


def origin_in(directory: AnyPath) -> Origin | None:
    """The origin that a converted directory, a prepared data set or a run keeps; None if it keeps none."""
    kept = directory / DIRECTORY
    if isinstance(kept, StorePath):
        return Origin(local_tree(kept)) if (kept / _COMPLETE).exists() else None
    if kept.is_symlink():
        raise UserError(f"{kept}: links to elsewhere; put the directory itself there")
    return Origin(kept) if kept.is_dir() else None


def origin_beside(file: str | AnyPath | None) -> Origin | None:
    """The origin of a tokenizer's file: an `origin/` beside it, or the files there; None for a bare file or no file."""
    if file is None:
        return None
    directory = to_path(file).absolute().parent
    kept = origin_in(directory)
    if kept is not None:
        return kept
    if not any((directory / name).is_file() for name in FILES):
        return None
    return Origin(local_tree(directory, (*FILES, CARD)))


def origin_of_model(tokenizer: TokenizerConfig, checkpoint: str | AnyPath) -> Origin | None:
    """The origin that a run directory, one of its checkpoints or a converted one keeps; or its tokenizer's."""
    path = to_path(checkpoint).absolute()
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    return origin_in(run) or origin_beside(tokenizer.path)
