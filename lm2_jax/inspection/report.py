"""From a checkpoint to pictures and a page: what tools/inspect_memory.py does."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import jax
import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.inspection.page import write_page
from lm2_jax.inspection.pictures import pictures, render, render_together
from lm2_jax.inspection.reading import check_memory, read_text
from lm2_jax.inspection.survival import Answers, Survival, answer, answers_by_age, make_contexts, probe
from lm2_jax.loading import load_run
from lm2_jax.tokenizer import Tokenizer, encode_long, load_text_tokenizer


def inspect(
    checkpoint: str,
    output: Path,
    text: str | None = None,
    segments: int | None = None,
    tokens: int = 48,
    questions: int = 512,
) -> list[Path]:
    """Looks into the memory of a checkpoint, and writes pictures and a page.

    Args:
      checkpoint: a run directory, one of its checkpoints, or a converted one.
      output: a directory; made if it is not there.
      text: a file to read; None: a story of the generator, for a model trained on stories.
      segments: how many to read; None: all of a text, or 4 windows of a story.
      tokens: how many of the last ones to look at one by one.
      questions: stories to ask about, for how long facts survive.

    Returns what it wrote, the page first. Raises UserError for what the user can mend.
    """
    problems = [
        f"--{name}: found {value}; give 1 or more"
        for name, value in (("segments", segments), ("tokens", tokens), ("questions", questions))
        if value is not None and value < 1
    ]
    if output.exists() and not output.is_dir():
        problems.append(f"--output: {output} is a file; give a directory")
    if problems:
        raise UserError("\n".join(problems))
    config, model, params = load_run(checkpoint)
    check_memory(model)
    tokenizer = load_text_tokenizer(config, checkpoint)
    T = config.trained_segment_length

    answers: Answers | None = None
    survival: Survival | None = None
    if text is not None:
        ids_n = encode_long(tokenizer, _read(text))[: None if segments is None else segments * T]
        reading = read_text(model, params, ids_n, tokens)
        survival = probe(reading.traces_SF, ids_n, T)
        source = f"{Path(text).name}, {len(ids_n):,} tokens"
    elif config.tokenizer.kind == "stories":
        segments = segments or 4 * config.stages[-1].segments
        contexts = make_contexts(config, tokenizer, segments, questions)
        ids_n = contexts.tokens_BST[0].ravel()[: (segments - 1) * T + contexts.asked_B[0] + 1]
        reading = read_text(model, params, ids_n, tokens)
        source = f"a story of {len(ids_n):,} tokens, up to its question"
        if model.kind.is_causal:
            answers = answer(model, params, contexts)
            survival = answers_by_age(answers)
            source += f"; of {questions} such questions {answers.right_B.mean():.1%} were answered"
    else:
        raise UserError(f"--text is missing; {checkpoint} was not trained on stories, so it has none of its own")

    output.mkdir(parents=True, exist_ok=True)
    words_K = _words(tokenizer, reading.last_ids_K)
    title, drawn, written = f"The memory of {checkpoint}", [], []
    for picture in pictures(reading, words_K, survival, answers):
        buffer = io.BytesIO()
        maps = render(picture, buffer)
        drawn.append((picture, buffer.getvalue(), maps))
        written.append(output / f"{picture.name}.png")
        written[-1].write_bytes(buffer.getvalue())
    overview = [picture for picture, *_ in drawn if picture.name in ("tokens", "writes", "survival")]
    render_together(overview, output / "overview.png", f"{title}\n{source}")
    facts = {
        "kind": model.spec.memory.kind,
        "memory": " x ".join(map(str, reading.slots_LNM.shape)) + " (banks, slots, width)",
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}",
        "read": source,
        "segment": f"{T} tokens",
    }
    write_page(output / "index.html", title, facts, drawn, reading, words_K)
    return [output / "index.html", output / "overview.png", *written]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: {path} cannot be read as a UTF-8 text file ({error})") from None


def _words(tokenizer: Tokenizer, ids_K: np.ndarray) -> list[str]:
    """The text of every token, with the spaces before it."""
    texts = [tokenizer.decode(ids_K[: k + 1].tolist()) for k in range(len(ids_K))]
    return [now[len(before) :] for before, now in itertools.pairwise(["", *texts])]
