"""From a checkpoint to pictures and a page (lm2_jax.inspect_memory)."""

from __future__ import annotations

import io
import itertools
from typing import NamedTuple

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.common.trees import writing
from lm2_jax.inspection.page import write_page
from lm2_jax.inspection.pictures import pictures, render, render_together
from lm2_jax.inspection.reading import MemoryTrace, check_memory, read_text
from lm2_jax.inspection.survival import Answers, Survival, answer_contexts, answers_by_age, make_contexts, probe
from lm2_jax.loading import LoadedRun, load_run
from lm2_jax.model.sizes import count_parameters
from lm2_jax.tokenizer import Tokenizer, load_text_tokenizer, prompt_ids


def inspect(
    checkpoint: str,
    output: AnyPath,
    text: str | None = None,
    segments: int | None = None,
    tokens: int = 48,
    questions: int = 512,
) -> list[AnyPath]:
    """Looks into the memory of a checkpoint; writes pictures and a page.

    Args:
      checkpoint: a run directory, one of its checkpoints, or a converted one.
      output: a directory; created if needed.
      text: a file to read; None: a story of the generator, for a model trained on stories.
      segments: how many to read; None: all of a text, or 4 windows of a story.
      tokens: how many of the last ones to show one by one.
      questions: stories to ask about, for how long facts survive.

    Returns the files it wrote, the page first. Raises UserError for what the user can mend.
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
    run = load_run(checkpoint)
    check_memory(run.model)
    tokenizer = load_text_tokenizer(run.config, checkpoint)
    if text is not None:
        inspected = _read_file(run, tokenizer, text, segments, tokens)
    elif run.config.tokenizer.kind == "stories":
        inspected = _read_story(run, tokenizer, segments, tokens, questions)
    else:
        raise UserError(f"--text is missing; {checkpoint} was not trained on stories, so it has none of its own")
    return _write(run, tokenizer, inspected, f"The memory of {checkpoint}", output)


class _Inspected(NamedTuple):
    trace: MemoryTrace
    source: str
    survival: Survival | None
    answers: Answers | None = None


def _read_file(run: LoadedRun, tokenizer: Tokenizer, path: str, segments: int | None, tokens: int) -> _Inspected:
    T = run.model.spec.segment_length
    ids_n = prompt_ids(tokenizer, _text(path))[: None if segments is None else segments * T]
    trace = read_text(run.model, run.params, ids_n, tokens)
    return _Inspected(trace, f"{to_path(path).name}, {len(ids_n):,} tokens", probe(trace.traces_SF, ids_n, T))


def _read_story(run: LoadedRun, tokenizer: Tokenizer, segments: int | None, tokens: int, questions: int) -> _Inspected:
    config, model, params = run
    segments = segments or 4 * config.stages[-1].segments
    contexts = make_contexts(config, tokenizer, segments, questions)
    ids_n = contexts.tokens_BST[0].ravel()[: (segments - 1) * model.spec.segment_length + contexts.asked_B[0] + 1]
    trace = read_text(model, params, ids_n, tokens)
    source = f"a story of {len(ids_n):,} tokens, up to its question"
    if not model.kind.is_causal:
        return _Inspected(trace, source, None)
    answers = answer_contexts(model, params, contexts)
    source += f"; of {questions} such questions {answers.right_B.mean():.1%} were answered"
    return _Inspected(trace, source, answers_by_age(answers), answers)


def _write(run: LoadedRun, tokenizer: Tokenizer, inspected: _Inspected, title: str, output: AnyPath) -> list[AnyPath]:
    output.mkdir(parents=True, exist_ok=True)
    trace, words_K = inspected.trace, _words(tokenizer, inspected.trace.last_ids_K)
    drawn, written = [], []
    for picture in pictures(trace, words_K, inspected.survival, inspected.answers):
        buffer = io.BytesIO()
        maps = render(picture, buffer)
        drawn.append((picture, buffer.getvalue(), maps))
        written.append(output / f"{picture.name}.png")
        written[-1].write_bytes(buffer.getvalue())
    overview = [picture for picture, *_ in drawn if picture.name in ("tokens", "writes", "survival")]
    with writing(output / "overview.png") as file:
        render_together(overview, file, f"{title}\n{inspected.source}")
    facts = {
        "kind": run.config.memory.kind,
        "memory": " x ".join(map(str, trace.slots_LNM.shape)) + " (banks, slots, width)",
        "parameters": f"{count_parameters(run.params):,}",
        "read": inspected.source,
        "segment": f"{trace.segment_length} tokens",
    }
    write_page(output / "index.html", title, facts, drawn, trace, words_K)
    return [output / "index.html", output / "overview.png", *written]


def _text(path: str) -> str:
    try:
        return to_path(path, "--text").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: {path} cannot be read as a UTF-8 text file ({error})") from None


def _words(tokenizer: Tokenizer, ids_K: np.ndarray) -> list[str]:
    """Text of every token, with the spaces before it."""
    texts = [tokenizer.decode(ids_K[: k + 1].tolist()) for k in range(len(ids_K))]
    return [now[len(before) :] for before, now in itertools.pairwise(["", *texts])]
