"""docs/configuration.md, made from the settings and their comments; test_docs.py holds the page equal.

python -m tests.configuration_page    # writes it anew
"""

import ast
import inspect
import io
import textwrap
import tokenize
import types
import typing
from pathlib import Path

import yaml
from pydantic import BaseModel

from lm2_jax.config import LARGEST, Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Every key a config may hold, with its type, its default and its meaning. This page is generated from
[`lm2_jax/config`](../lm2_jax/config) by `python -m tests.configuration_page`; a test holds the two equal.

A config file holds any subset of these keys, and `--set section.key=value` overrides one of them (the value is YAML; a
whole section may be set as `{key: value, ...}`). All mistakes are reported at once, each with the file, the key, the
value found and what would be right. `config.yaml` in a run directory is the complete config that a run used. Where one
text is meant, a list of one may be written without brackets. Start from one of [`configs/`](../configs): its name
alone, as in `--config lm2_125m`, is enough, and finds it where lm2_jax is installed as a package too.
"""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page() -> str:
    parts, waiting, seen = [HEAD], [("", Config)], {}
    while waiting:
        key, section = waiting.pop(0)
        seen[section] = key
        hints = typing.get_type_hints(section, include_extras=True)
        comments = {}
        for ancestor in reversed([c for c in section.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
            comments |= comments_of(ancestor)
        rows, inner = [], []
        for name, field in section.model_fields.items():
            full = f"{key}.{name}" if key else name
            found = section_within(hints[name])
            if found and found not in seen:
                full_key = full + "[]" * (typing.get_origin(hints[name]) is tuple)
                inner.append((full_key, found))
            if found and isinstance(field.default, BaseModel):
                continue  # a section that is always there has a table of its own
            default = "required" if field.is_required() else f"`{default_of(field.default)}`"
            kind = words(hints[name], seen | {within: inner_key for inner_key, within in inner})
            rows.append(f"| `{name}` | {kind} | {default} | {comments.get(name, '')} |".replace("|  |", "| |"))
        waiting = inner + waiting
        if key:
            level = "#" * (1 + len(key.split(".")))
            doc = inspect.getdoc(section)
            parts.append(
                "\n".join(
                    [f"{level} {key}\n\n{doc}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
                )
            )
    return "\n".join(parts)


def section_within(hint):
    """The section class in a type, or None."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    return next(filter(None, map(section_within, typing.get_args(hint))), None)


def words(hint, sections) -> str:
    """A type in words, with its bounds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [
            f"{sign} {short(value)}"
            for item in getattr(arguments[1], "metadata", [])
            for name, sign in SIGNS.items()
            if (value := getattr(item, name, None)) is not None and value != LARGEST
        ]
        return " ".join([words(arguments[0], sections), ", ".join(bounds)]).strip()
    if origin is typing.Literal:
        options = [f"`{option}`" for option in arguments]
        return ", ".join(options) if len(options) < 8 else f"{options[0]} to {options[-1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else words(part, sections) for part in arguments)
    if origin is dict:
        return "mapping"
    if origin is tuple:
        inside = [words(part, sections) for part in arguments if part is not Ellipsis]
        many = f"list of {inside[0]}".replace("list of section ", "list of sections ")
        return many if Ellipsis in arguments else f"[{', '.join(inside)}]"
    return NAMES[hint] if hint in NAMES else f"section `{sections[hint]}`"


def short(number) -> str:
    return f"2^{number.bit_length() - 1}" if number > 10_000 and number & (number - 1) == 0 else str(number)


def default_of(value) -> str:
    """A default as YAML writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    written = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value
    return yaml.safe_dump(written, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def comments_of(section) -> dict[str, str]:
    """A section's keys and their comments: behind the key, or on the lines above it."""
    source = textwrap.dedent(inspect.getsource(section))
    code = {number for number, line in enumerate(source.splitlines(), 1) if not line.strip().startswith("#")}
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            lines = [node.end_lineno]
            first = node.lineno
            while first - 1 in comments and first - 1 not in code:
                first -= 1
                lines.insert(0, first)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments).replace("|", "\\|")
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
