"""A window in other libraries: a Mistral has one, a Llama one by its mask; official models have none."""

import json

import jax
import numpy as np
import pytest
from convert_helpers import convert, random_llama, random_own, random_tokens, torch, torch_logits, transformers
from window_reference import visible

import lm2_jax
from lm2_jax.common.errors import UserError
from lm2_jax.config import load_config
from lm2_jax.loading import load_weights
from lm2_jax.model import build_model
from lm2_jax.segments import run_segments

T, S = 8, 4
NAMES = ("tied, grouped", "untied, llama3 scaling")
SEGMENTS = f"data.segment_length={T}"


def logits_of(path, tokens):
    """Of texts of S segments, [B, S T, V]."""
    model, params = lm2_jax.load(path)
    run = jax.jit(lambda params, tokens: run_segments(model, params, tokens, model.init_memory(len(tokens)))[0])
    return np.asarray(run(params, tokens.reshape(-1, S, T))).reshape(*tokens.shape, -1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [T, 5])
def test_a_window_is_a_mistral(name, window, tmp_path):
    random_llama(tmp_path / "llama", name)
    ours = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours", SEGMENTS, f"model.window={window}")
    theirs = convert("lm2_jax", "huggingface", ours, tmp_path / "theirs")
    mistral = transformers.AutoModelForCausalLM.from_pretrained(theirs, attn_implementation="eager").eval()
    assert type(mistral) is transformers.MistralForCausalLM and mistral.config.sliding_window == window
    tokens = random_tokens((2, S * T))
    found = logits_of(ours, tokens)
    np.testing.assert_allclose(found, torch_logits(mistral, tokens), atol=1e-4)
    assert np.abs(found[:, :T] - logits_of(ours, np.roll(tokens, T, axis=1))[:, T : 2 * T]).max() > 1e-2
    back = convert("huggingface", "lm2_jax", theirs, tmp_path / "back", SEGMENTS)
    assert load_config(back / "config.yaml").model == load_config(ours / "config.yaml").model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [T, 5])
def test_a_window_with_sinks_is_a_llama_under_a_mask(name, window, tmp_path):
    llama = random_llama(tmp_path / "llama", name)
    settings = (SEGMENTS, f"model.window={window}", "model.sinks=3")
    ours = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours", *settings)
    tokens = random_tokens((2, S * T))
    mask = torch.tensor(visible(S * T, window, 3)).expand(2, 1, -1, -1)
    np.testing.assert_allclose(logits_of(ours, tokens), torch_logits(llama, tokens, attention_mask=mask), atol=1e-4)


def test_the_longest_distance_is_the_llamas(tmp_path):
    random_llama(tmp_path / "llama")  # of 256 positions
    for window, longest in (("null", None), (T, 255)):
        output = tmp_path / f"ours {window}"
        convert("huggingface", "lm2_jax", tmp_path / "llama", output, SEGMENTS, f"model.window={window}")
        assert load_config(output / "config.yaml").model.max_distance == longest


def test_a_llama_without_its_first_token_is_warned_about(tmp_path, capsys):
    random_llama(tmp_path / "llama")
    for sinks in (1, 0):
        settings = (SEGMENTS, f"model.window={T}", f"model.sinks={sinks}")
        convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / f"{sinks}", *settings)
        assert ("model.window 8 without model.sinks" in capsys.readouterr().err) == (not sinks)


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    random_llama(tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for window, segment_length in ((None, 256), (64, 256), (4096, 4096)):
        changed = settings | {"model_type": "mistral", "sliding_window": window, "max_position_embeddings": 256}
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(changed))
        config = load_config(
            convert("huggingface", "lm2_jax", tmp_path / "theirs", tmp_path / f"{window}") / "config.yaml"
        )
        assert (config.model.window, config.data.segment_length) == (window, segment_length)


def test_a_run_with_a_window_starts_from_any_weights(tmp_path):
    """train.init_from: weights do not depend on how far attention reaches."""
    random_own(tmp_path / "ours", "memory.kind=none")
    config = load_config(tmp_path / "ours" / "config.yaml", ["model.window=8", "model.sinks=2", "model.max_distance=9"])
    model = build_model(config)
    weights = load_weights(str(tmp_path / "ours"), model, model.abstract_params())
    assert weights.keys() == {"blocks", "embedding", "final_norm"}


def test_the_official_code_has_no_window(tmp_path):
    random_own(tmp_path / "ours", "model.window=8", "memory.kind=none")
    with pytest.raises(UserError, match=r"--to official: model\.window 8: .* sees one segment alone"):
        convert("lm2_jax", "official", tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
