"""The parameters that are trained: by groups and patterns over their names, and the tree under "params" in two.

Names are paths such as "bank_blocks/attention/query"; `optim.train` lists groups (`all`, `memory`, `lora`) and
patterns in which * stands for any characters, such as "blocks/mlp/*".
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence, Set
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from lm2_jax.common.errors import UserError
from lm2_jax.model.decoder import Decoder
from lm2_jax.model.lora import is_addition


def trained_names(model: Decoder, asked: Sequence[str]) -> frozenset[str]:
    """Names of the parameters that the groups and patterns of optim.train take together.

    Raises UserError, with the names that exist, if one of them takes none.
    """
    names, outside_blocks = flatten_dict(model.abstract_params(), sep="/"), model.kind.parameters()
    groups: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "memory": lambda name: "/memory/" in name or name in outside_blocks,
        "lora": is_addition,
    }
    trained: set[str] = set()
    for one in asked:
        takes = groups.get(one, lambda name, pattern=one: fnmatch.fnmatchcase(name, pattern))
        taken = {name for name in names if takes(name)}
        if not taken:
            raise UserError(
                f"optim.train: {one} takes no parameter of this model; all, memory and lora are groups, anything else "
                "a pattern over the names\n" + "\n".join(f"  {name}" for name in sorted(names))
            )
        trained |= taken
    return frozenset(trained)


def split_params(params: Any, trained: Set[str]) -> tuple[Any, Any]:
    """The tree under "params" as two: what is trained, and the rest."""
    leaves = flatten_dict(params, sep="/")
    return tuple(
        unflatten_dict({name: leaf for name, leaf in leaves.items() if (name in trained) == wanted}, sep="/")
        for wanted in (True, False)
    )


def join_params(trained: Any, frozen: Any) -> Any:
    """Undoes `split_params`."""
    if not frozen:
        return trained
    return unflatten_dict(flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/"), sep="/")
