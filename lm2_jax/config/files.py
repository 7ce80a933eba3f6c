"""Configs from and to YAML files, with overrides of single keys.

The YAML has 1.2's numbers and booleans, no duplicate keys, and nothing that explodes when it is read. Errors name the
key, the value found and what would be right.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.common.untrusted import read_limited, short_repr
from lm2_jax.config.sections import Section
from lm2_jax.config.spec import Config

_PACKAGED = Path(__file__).with_name("shipped")  # pyproject.toml puts configs/ there in a wheel
SHIPPED = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "configs"

_LONGEST = 1 << 18  # bytes of a config file; PyYAML reads as many in seconds
_MOST_EXPANDED = 1 << 20  # characters of a document whose aliases are expanded
_EXPECTED = {"model_type": "should be a section with keys", "tuple_type": "should be a list, [a, b]"}


def load_config(path: str | AnyPath, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML config and applies overrides of the form "a.b=c" (the value is YAML).

    path: a file, or the bare name of a config that comes with lm2_jax, such as "lm2_125m".

    Raises UserError with every problem found: unreadable file, unknown keys (with a suggestion), wrong types, values
    that do not fit together.
    """
    shipped, path = _shipped(str(path)), to_path(path)
    try:
        text = read_limited(shipped or path, _LONGEST).decode()
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise UserError(f"{path}: no such config file; give its path, or the name of one of these: {names}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    return parse_config(text, overrides, where=str(path))


def _shipped(name: str) -> Path | None:
    """The shipped config of this name; None for other names, for paths, and for a file that is called so."""
    file = SHIPPED / f"{name}.yaml"
    return file if name.isidentifier() and file.is_file() and not Path(name).is_file() else None


def parse_config(text: str, overrides: Iterable[str] = (), where: str = "config") -> Config:
    """Reads a config from YAML text, like `load_config`; messages call the text `where`."""
    values = _parse_yaml(text, where)
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


def save_config(config: Config, path: str | AnyPath) -> None:
    """Writes the complete config as YAML that `load_config` reads back to an equal one."""
    to_path(path).write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """The complete config as YAML text."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


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
        value = _parse_yaml(text, f"--set {key}")
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
            problems += [origin + line for line in _explain(item, key)]
    if problems:
        raise UserError("\n".join(problems))
    return config


def _is_within(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")


def _explain(item: Mapping[str, Any], key: str) -> list[str]:
    """Readable lines for one pydantic error at `key`."""
    found = item.get("input")
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return [f"{key}: unknown key; {hint}"]
    if item["type"] == "value_error":  # our own checks: they begin with the key, relative to their section
        prefix = f"{key}." if key else ""
        return [prefix + line for line in str(item["ctx"]["error"]).split("\n")]
    if item["type"] == "missing":
        return [f"{key}: is missing; give it a value"]
    if item["type"] == "too_short" and found:
        return []  # its items were refused one by one
    expected = _EXPECTED.get(item["type"], item["msg"]).replace("Input should be", "should be")
    expected = expected.replace("Tuple", "list").replace(" after validation", "")  # what YAML calls it
    return [f"{key}: found {short_repr(found)}; {expected[0].lower()}{expected[1:]}"]


def _known_keys(location: Sequence[str | int]) -> list[str]:
    model = Config
    for name in location:
        if isinstance(name, str):
            model = _section_type(model.model_fields[name].annotation)
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[Section]:
    """The section of a field's annotation, be it optional or a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(_section_type(arg) for arg in get_args(annotation) if arg not in (type(None), Ellipsis))


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads 0100 as a hundred, 3e-4 as a float, and 1:30, 1_000, 2025-01-31 and off as text, as in YAML 1.2."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MOST_EXPANDED:
            raise _error_at(node, "its aliases (*name) expand to far more than is written")
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise _error_at(node, "text with a NUL, or with half a surrogate pair")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # PyYAML itself refuses lists as keys; merged keys (<<) may be overridden
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise _error_at(key_node, f"key {key!r} appears twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _error_at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _expanded_size(node: yaml.Node, known: dict[int, float]) -> float:
    """Characters and values of a node once every alias is expanded; infinite for a node that contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = math.inf  # until its children are counted, for one that contains itself
        is_mapping = isinstance(node, yaml.MappingNode)
        children = itertools.chain.from_iterable(node.value) if is_mapping else node.value
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in children)
    return known[id(node)]


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader`, or a reader of YAML 1.1, would take for something else."""


# What is not text: the core schema of YAML 1.2, and the merging of mappings, which is older
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
_RESOLVERS = [(f"tag:yaml.org,2002:{kind}", re.compile(rf"({pattern})\Z")) for kind, pattern in _SCALARS.items()]
_Loader.yaml_implicit_resolvers = {None: _RESOLVERS}  # None: whatever the first character is
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Dumper.yaml_implicit_resolvers = {**_Dumper.yaml_implicit_resolvers, None: _RESOLVERS}


def _parse_yaml(text: str, where: str) -> Any:
    """The value of YAML text. Raises UserError, naming it `where`, with the line and the problem."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    except Exception as error:  # whatever PyYAML raises for a value that does not fit its tag
        raise UserError(f"{where}: is not valid YAML: {error}") from None
