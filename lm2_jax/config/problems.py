"""Errors of pydantic in words that name the key, the value found and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from lm2_jax.common.untrusted import short_repr

_EXPECTED = {"model_type": "should be a section with keys", "tuple_type": "should be a list, [a, b]"}


def explain(item: Mapping[str, Any], key: str, root: type[BaseModel]) -> list[str]:
    """Readable lines for one pydantic error at `key` of a `root`."""
    found = item.get("input")
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1], root)
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


def _known_keys(location: Sequence[str | int], model: type[BaseModel]) -> list[str]:
    for name in location:
        if isinstance(name, str):
            model = _section_type(model.model_fields[name].annotation)
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[BaseModel]:
    """The section of a field's annotation, be it optional or a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_type(arg) for arg in get_args(annotation) if arg not in (type(None), Ellipsis))
