"""Accuracy by context length, against every question read by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.common.statistics import wilson_interval
from lm2_jax.config import parse_config
from lm2_jax.data.babi.sources import QuestionSource
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.model import build_model
from lm2_jax.parallel.mesh import make_mesh, use_mesh
from lm2_jax.segments import run_segments
from lm2_jax.tokenizer import load_tokenizer
from lm2_jax.training.accuracy import accuracy_by_length
from lm2_jax.training.state import StepConfig, create_state

T, LENGTHS, QUESTIONS = 32, (0, 1, 3), 20
CONFIG = f"""
model: {{vocab_size: 185, d_model: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, d_ff: 16, tie_embeddings: false}}
memory: {{num_slots: 2, num_heads: 2}}
data: {{batch_size: 4, segment_length: {T}, segments_per_window: 2, stories: {{tasks: [qa1, qa4]}}}}
eval: {{lengths: {list(LENGTHS)}, questions: {QUESTIONS}}}
"""


@pytest.mark.parametrize("one_segment", [False, True])
@pytest.mark.parametrize("kind", ["lm2", "none"])
def test_accuracy_by_length(kind, one_segment):
    config = parse_config(CONFIG, [f"memory.kind={kind}", f"eval.one_segment={one_segment}"])
    model, tokenizer, mesh = build_model(config), load_tokenizer(config.tokenizer), make_mesh(config, jax.devices()[:1])
    pipeline = Pipeline(config, tokenizer)
    with use_mesh(mesh):
        state = create_state(model, mesh, StepConfig.of(config))
        # Only answers come into question, or a model that has learnt nothing would never be right
        answers = tokenizer.encode(
            "bathroom bedroom garden hallway kitchen office apple football milk Bill Fred Jeff Mary"
        )
        state.params["head"] = jnp.zeros_like(state.params["head"]).at[np.array(answers)].set(1)
        state.params["head"] *= jax.random.normal(jax.random.key(4), state.params["head"].shape)
        table = accuracy_by_length(config, model, pipeline, mesh, state.params, lambda _: None)
    assert [(cell["questions"], cell["segments"], cell["asked"]) for cell in table] == [
        (f"{task} (generator)", length, QUESTIONS) for task in config.data.stories.tasks for length in LENGTHS
    ]
    assert sum(cell["correct"] for cell in table) > 5
    for cell in table:
        budget = cell["segments"] * T or None
        data = parse_config(CONFIG, [f"data.stories.tasks=[{cell['questions'].split()[0]}]"]).data
        source = QuestionSource(data, tokenizer, budget=budget, seed=0, count=QUESTIONS, segment_length=T)
        documents = [source[i] for i in range(QUESTIONS)]
        longest = max(len(document.tokens) for document in documents) - 1
        assert cell["tokens"] == (budget or longest)
        length = longest if one_segment else T
        assert cell["correct"] == sum(_is_right(model, state.params, document, length) for document in documents)


@functools.cache
def _reader(model):
    return jax.jit(lambda params, tokens_B1T, memory: run_segments(model, params, tokens_B1T, memory))


def _is_right(model, params, document, segment_length):
    """Reads one document, segment after segment; what pads the last one comes after all that counts."""
    memory, guesses = model.init_memory(1, params), []
    tokens = np.pad(document.tokens[:-1], (0, -(len(document.tokens) - 1) % segment_length))
    for tokens_T in tokens.reshape(-1, segment_length):
        logits_B1TV, memory = _reader(model)(params, tokens_T[None, None], memory)
        guesses.append(np.argmax(logits_B1TV[0, 0], -1))
    right = np.concatenate(guesses)[: len(document.tokens) - 1] == document.tokens[1:]
    return right[document.answers[1:]].all()


def test_wilson_interval():
    """Against the worked example of 15 successes in 20 trials (statsmodels proportion_confint, method wilson)."""
    np.testing.assert_allclose(wilson_interval(15, 20), (0.53130, 0.88814), atol=5e-5)
    low, high = wilson_interval(20, 20)
    assert 0.8 < low < high <= 1
