"""Exported models with a window over segment edges: equal to ours, packed or alone, in calls of any size, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import V, convert, random_own, random_tokens, torch, torch_logits
from export_helpers import exported, greedy, logits_in_pieces, random_ids
from safetensors.numpy import load_file
from window_reference import logits_of

import lm2_jax
from lm2_jax.config import load_config
from lm2_jax.convert.huggingface_model.configuration_lm2 import LM2Config
from lm2_jax.convert.huggingface_model.modeling_lm2 import LM2ForCausalLM
from lm2_jax.decoding.sampling import generate
from lm2_jax.segments import run_segments

T, S = 8, 5
WINDOWS = [
    *({"window": window, "sinks": sinks} for window in (T, 5) for sinks in (0, 1, 4)),
    {"window": T, "sinks": 4, "max_distance": 9},  # cut for some sinks of a query, for others not
    {"window": 5, "sinks": 2, "max_distance": 4},  # every sink beyond the window
]
# A window of kind `none` without sinks is a Mistral
MODELS = [("lm2", window) for window in WINDOWS] + [("none", window) for window in WINDOWS if window["sinks"]]


def named(parameter):
    return "-".join(map(str, parameter.values() if isinstance(parameter, dict) else [parameter]))


@functools.cache
def directories(base, kind, *window):
    """Ours, and the same exported."""
    path = base / "-".join(map(str, (kind, *window)))
    settings = [f"model.{key}={value}" for key, value in window]
    sizes = (f"data.segment_length={T}", f"memory.kind={kind}", "memory.num_layers=1", "model.embedding_std=0.5")
    ours = random_own(path / "ours", *sizes, *settings, noise=0.15)
    return ours, convert("lm2_jax", "huggingface", ours, path / "theirs")


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"{model[0]}-{named(model[1])}")
def pair(request, tmp_path_factory):
    """(our directory, our model and parameters, the same in transformers)."""
    kind, window = request.param
    ours, theirs = directories(tmp_path_factory.getbasetemp() / "window", kind, *window.items())
    return ours, *lm2_jax.load(ours), LM2ForCausalLM.from_pretrained(theirs).eval()


def test_logits_over_segments(pair):
    """Of 5 segments at once, of rows that padding parts, and of documents that are packed into a row."""
    _, model, params, theirs = pair
    tokens_BC = random_tokens((2, S * T))
    run = jax.jit(lambda params, tokens, memory: run_segments(model, params, tokens, memory)[0])
    expected = run(params, tokens_BC.reshape(2, S, T), model.init_memory(2, params)).reshape(2, S * T, V)
    found = torch_logits(theirs, tokens_BC)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - expected[:, ::-1]).max() > 1
