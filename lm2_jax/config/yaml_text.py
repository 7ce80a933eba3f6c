"""YAML from and to text: 1.2's numbers, no duplicate keys, and nothing that explodes when it is read."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import yaml

from lm2_jax.common.errors import UserError

_MOST_EXPANDED = 1 << 20  # characters of a document whose aliases are expanded


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a float and 2025-01-31 as text, as in YAML 1.2."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > _MOST_EXPANDED:
            raise yaml.composer.ComposerError(
                None, None, "its aliases (*name) expand to far more than is written", node.start_mark
            )
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(
                None, None, "text with a NUL, or with half a surrogate pair", node.start_mark
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # PyYAML itself refuses lists as keys; merged keys (<<) may be overridden
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


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


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML text. Raises UserError, naming it `where`, with the line and the problem."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    except Exception as error:  # whatever PyYAML raises for a value that does not fit its tag
        raise UserError(f"{where}: is not valid YAML: {error}") from None


def dump_yaml(values: Any) -> str:
    """YAML text that `parse_yaml` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
