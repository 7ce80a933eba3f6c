"""Configs from and to YAML files, with overrides of single keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import read_limited
from lm2_jax.config.problems import explain
from lm2_jax.config.run import Config
from lm2_jax.config.yaml_text import dump_yaml, parse_yaml

_LONGEST = 1 << 18  # bytes of a config file; PyYAML reads as many in seconds


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML config and applies overrides of the form "a.b=c" (the value is YAML).

    Raises UserError with every problem found: unreadable file, unknown keys (with a suggestion), wrong types, values
    that do not fit together.
    """
    path = Path(path)
    try:
        text = read_limited(path, _LONGEST).decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    return parse_config(text, overrides, where=str(path))


def parse_config(text: str, overrides: Iterable[str] = (), where: str = "config") -> Config:
    """Reads a config from YAML text, like `load_config`; messages call the text `where`."""
    values = parse_yaml(text, where)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds {type(values).__name__}; expected sections such as 'model:' and 'data:'")
    values = {key: {} if value is None else value for key, value in values.items()}  # "train:" with nothing under it
    problems, overridden = [], []
    for override in overrides:
        try:
            overridden.append(_apply_override(values, override))
        except UserError as error:
            problems.append(str(error))
    return _validate(values, where, overridden, problems)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the complete config as YAML that `load_config` reads back to an equal one."""
    Path(path).write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """The complete config as YAML text."""
    return dump_yaml(config.model_dump(mode="json"))


def replace(config: Config, **changes: Mapping[str, Any]) -> Config:
    """A validated copy with some keys changed: `replace(config, memory={"kind": "none"})`.

    Raises UserError as `load_config` does.
    """
    values = config.model_dump()
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    return _validate(values, "config")


def _apply_override(values: dict, override: str) -> str:
    """Sets the key of "a.b=c" in `values` and returns it."""
    key, equals, text = override.partition("=")
    *sections, last = (part.strip() for part in key.split("."))
    if not (equals and last and all(sections)):
        raise UserError(f"--set {override!r}: write KEY=VALUE, for example --set train.steps=100")
    try:
        value = parse_yaml(text, f"--set {key}")
    except UserError as error:
        raise UserError(f"{error}; text with special characters needs quotes, --set '{key}=\"...\"'") from None
    if value is None and text.lstrip().startswith("#"):
        raise UserError(f"--set {override!r}: YAML reads a comment here; put the value in quotes, '{key}=\"...\"'")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {section!r} is a value, not a section with keys; set it as a whole")
    node[last] = value
    return ".".join((*sections, last))


def _validate(values: dict, where: str, overridden: Sequence[str] = (), problems: Sequence[str] = ()) -> Config:
    """The config of these values.

    Raises UserError with its problems after those already known; each begins with its origin, --set or `where`.
    """
    try:
        config = Config.model_validate(values)
    except pydantic.ValidationError as error:
        problems = list(problems)
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            is_override = any(_is_within(key, other) or _is_within(other, key) for other in overridden)
            origin = "--set " if is_override and item["type"] != "value_error" else f"{where}: "
            problems += [origin + line for line in explain(item, key, Config)]
    if problems:
        raise UserError("\n".join(problems))
    return config


def _is_within(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")
