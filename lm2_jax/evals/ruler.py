"""A check of RULER's variable tracking, which lm-evaluation-harness 0.4.13 prepares in a loop that may never end.

It draws a text again and again until one is as short as `max_seq_lengths` asks; an example in front of each question
has 500 tokens at most. A tokenizer of bytes needs more for the shortest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lm2_jax.common.errors import UserError

_TASKS = {"ruler_vt", "ruler", "longcxt"}  # the task, its group and its tag
_EXAMPLE, _NEW_TOKENS = 500, 30  # tokens: the harness's constants
_FEWEST = {"example": 5, "question": 10}  # sentences of noise
_CHAINS, _HOPS = 1, 4


def refuse_endless(names: Iterable[str], metadata: Mapping[str, Any]) -> None:
    """Raises UserError for lengths that the texts of `ruler_vt`, if it is among the tasks, cannot have."""
    if not _TASKS & set(names):
        return
    from lm_eval.tasks.ruler import common_utils, vt_utils

    tokenizer = common_utils.get_tokenizer(common_utils.resolve_tokenizer_name(metadata))

    def count(kind: str) -> int:
        text, _ = vt_utils.generate_input_output(_FEWEST[kind], _CHAINS, _HOPS, is_icl=kind == "example")
        return len(tokenizer(text).input_ids) + _NEW_TOKENS

    if (example := count("example")) > _EXAMPLE:
        raise UserError(
            f"eval.harness.tasks: ruler_vt puts an example of {_EXAMPLE} tokens in front of its questions, and the "
            f"shortest has {example} in this tokenizer; set eval.harness.metadata.tokenizer to a coarser one"
        )
    shortest = _EXAMPLE + count("question")
    if short := [length for length in metadata.get("max_seq_lengths", ()) if length < shortest]:
        raise UserError(
            f"eval.harness.metadata.max_seq_lengths: found {short[0]}, but the shortest texts of ruler_vt may need "
            f"{shortest} tokens; leave out shorter lengths"
        )
