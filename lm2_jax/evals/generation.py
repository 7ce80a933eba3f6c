"""Generated answers to prompts, each from a fresh memory and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm2_jax.decoding import sampling
from lm2_jax.evals.model import EvalModel


def generate_until(
    loaded: EvalModel,
    prompts: Sequence[Sequence[int]],
    rows: int,
    max_new_tokens: int,
    stops: Sequence[str],
    seeds: Sequence[int] = (),
    **options: Any,
) -> list[str]:
    """Generates the text that follows each prompt, up to its first stop string or an end token.

    Args:
      prompts: token ids, of any lengths.
      rows: batch size, at least the number of prompts; the same for every batch, so that one compiled program serves.
      stops: strings that end an answer, and are not part of it.
      seeds: one for each prompt, if tokens are sampled.
      options: temperature, top_k and top_p of `sampling.decode`; greedy without them.
    """
    tokenizer, model, spare = loaded.tokenizer, loaded.model, rows - len(prompts)
    written: list[list[int]] = [[] for _ in prompts]

    def is_over(row: int, token: int) -> bool:
        if row >= len(prompts):
            return True
        written[row].append(token)
        text = tokenizer.decode(written[row])
        return any(stop in text for stop in stops)

    sampling.decode(
        model,
        loaded.decoding_params,
        [*prompts, *[[0]] * spare],
        sampling.start(model, loaded.decoding_params, rows),
        max_new_tokens=max_new_tokens,
        seed=[*seeds, *[0] * spare] if seeds else 0,
        stop_ids=tokenizer.special.stop_ids,
        on_token=is_over,
        **options,
    )
    texts = [tokenizer.decode(ids) for ids in written]
    return [text[: min((text.find(stop) for stop in stops if stop in text), default=None)] for text in texts]
