"""The look into the banks sees what the model does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inspect_memory import draw, make_contexts, trace

from lm2_jax.config import parse_config
from lm2_jax.model import build_model
from lm2_jax.segments import run_segments
from lm2_jax.tokenizer import load_tokenizer

T, S, B = 24, 3, 16
CONFIG = f"""
model: {{vocab_size: 185, d_model: 16, num_layers: 2, num_heads: 2, num_kv_heads: 2, d_ff: 16, conv_width: 4}}
memory: {{num_slots: 3, num_heads: 2}}
data: {{batch_size: 4, segment_length: {T}, segments_per_window: {S}, stories: {{facts: [1, 4]}}}}
"""


@pytest.mark.parametrize("overrides", [(), ("memory.num_layers=1", "memory.width=8")])
def test_trace(overrides, tmp_path):
    config = parse_config(CONFIG, overrides)
    model, tokenizer = build_model(config), load_tokenizer(config.tokenizer)
    contexts = make_contexts(config, tokenizer, S, B)
    params = model.init(jax.random.key(0), jnp.zeros((1, T), jnp.int32), model.init_memory(1))["params"]
    logits_BSTV, _ = run_segments(model, params, contexts.tokens_BST, model.init_memory(B, params))
    guesses_B = np.argmax(logits_BSTV[np.arange(B), -1, contexts.asked_B], axis=-1)
    contexts.target_B[::2] = guesses_B[::2]  # half of the answers are what the model says
    contexts.target_B[1::2] = guesses_B[1::2] + 1
    seen = trace(config, params, contexts)
    np.testing.assert_array_equal(seen.right_B, np.arange(B) % 2 == 0)
    assert seen.read_LBHN.shape == (config.num_memory_layers, B, 2, 3)
    np.testing.assert_allclose(seen.read_LBHN.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen.written_LBST.sum(-1), 1, rtol=1e-5)
    draw(tmp_path / "memory.png", "title", contexts, seen, ["where", "is", "mary?"])
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_contexts():
    config = parse_config(CONFIG)
    tokenizer = load_tokenizer(config.tokenizer)
    contexts = make_contexts(config, tokenizer, S, B)
    for b in range(B):
        segments = [tokenizer.decode(tokens_T) for tokens_T in contexts.tokens_BST[b]]
        person = segments[-1][: segments[-1].rindex("?")].split()[-1]
        assert tokenizer.decode(contexts.tokens_BST[b, -1, : contexts.asked_B[b] + 1]).endswith(f"where is {person}?")
        place = tokenizer.decode([contexts.target_B[b]])
        answering = segments[S - 1 - contexts.age_B[b]]
        assert person in answering and f"to the {place}." in answering
        told = tokenizer.decode(contexts.tokens_BST[b][contexts.fact_BST[b]])
        assert 1 <= told.count(".") <= 4 and told.count(".") == told.count(" to the ")
