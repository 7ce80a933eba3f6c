"""A real Llama with a window: the Hugging Face directory that LM2_REAL_LLAMA names, such as SmolLM2-135M-Instruct.

LM2_REAL_LLAMA=SmolLM2-135M-Instruct python -m pytest tests/test_real_llama.py --runslow -s
"""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from convert_helpers import convert, torch, transformers
from safetensors.numpy import load_file, save_file
from window_reference import visible

import lm2_jax
from lm2_jax.config import dump_config, load_config
from lm2_jax.decoding.sampling import generate
from lm2_jax.model import build_model
from lm2_jax.segments import run_segments

LLAMA = os.environ.get("LM2_REAL_LLAMA")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not LLAMA, reason="LM2_REAL_LLAMA names no directory")]
T, S = 64, 4
# Lanes of one batch: a document of 4 segments, and documents that segments cut or hold
LANES = ((S * T,), (100, 20, 81, 30, 25))
WINDOWS = [(T, 0), (40, 0), (T, 4), (40, 1), (40, 4)]
CUT = [(T, 4, 100), (40, 1, 39), (40, 4, 130)]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The Llama as kind lm2 with a window and a sink, before any training."""
    path = tmp_path_factory.mktemp("warm") / "warm"
    settings = [f"data.segment_length={T}", f"model.window={T}", "model.sinks=1", "memory.kind=lm2", "memory.width=192"]
    return convert("huggingface", "lm2_jax", LLAMA, path, *settings)


@pytest.fixture(scope="module")
def params(warm):
    return lm2_jax.load(warm)[1]


@pytest.fixture(scope="module")
def tokens():
    """The text of LM2_REAL_TEXT, or the README's."""
    text = Path(os.environ.get("LM2_REAL_TEXT", Path(__file__).parents[1] / "README.md")).read_text("utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(LLAMA)(text).input_ids
    return np.array(ids, np.int32)


def lanes(tokens):
    """tokens, document ids and resets [B,S,T] and [B,S]; and the documents' tokens."""
    tokens_BC = tokens[: len(LANES) * S * T].reshape(len(LANES), -1)
    ends = [np.cumsum(lengths) for lengths in LANES]
    begins = np.stack([np.isin(np.arange(S * T), [0, *end]) for end in ends]).reshape(-1, S, T)
    reset = begins[:, :, 0]
    document = (begins.cumsum(-1) + ~reset[..., None]).astype(np.int32)
    documents = [x for row, end in zip(tokens_BC, ends, strict=True) for x in np.split(row, end[:-1])]
    return tokens_BC.reshape(begins.shape), document, reset, documents


def ours(warm, params, tokens, schedule, **window):
    """Logits of all documents, one after another."""
    model = build_model(load_config(warm / "config.yaml", [f"model.{key}={value}" for key, value in window.items()]))
    tokens_BST, document_BST, reset_BS, _ = lanes(tokens)
    memory = model.init_memory(len(LANES), params)

    @jax.jit
    def run(params):
        rest = {"document_BST": document_BST, "reset_BS": reset_BS, "schedule": schedule}
        return run_segments(model, params, tokens_BST, memory, **rest)[0]

    return np.asarray(run(params)).reshape(len(LANES) * S * T, -1)


def theirs(model, tokens, **inputs):
    """Logits in float64 of all documents, each read alone; inputs: of a document's length."""
    model = model.eval().double()
    with torch.no_grad():
        logits = [
            model(torch.tensor(x)[None].long(), **{name: make(len(x)) for name, make in inputs.items()}).logits[0]
            for x in lanes(tokens)[3]
        ]
    return torch.cat(logits).numpy()


def assert_close(name, found, expected, tolerance=1e-3):
    worst = np.abs(found - expected).max()
    print(f"{name}: largest difference {worst:.1e}, logits up to {np.abs(expected).max():.1f}", flush=True)
    assert worst < tolerance


@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_before_training_it_is_the_llama(warm, params, tokens, window, sinks):
    """A Mistral without sinks, a Llama under a dense mask with sinks; no distance is cut."""
    if sinks:
        llama = transformers.LlamaForCausalLM.from_pretrained(LLAMA)
        mask = {"attention_mask": lambda t: torch.tensor(visible(t, window, sinks))[None, None]}
        expected = theirs(llama, tokens, **mask)
    else:
        config = transformers.AutoConfig.from_pretrained(LLAMA).to_dict()
        config = transformers.MistralConfig(**{**config, "sliding_window": window})
        expected = theirs(transformers.MistralForCausalLM.from_pretrained(LLAMA, config=config), tokens)
    for schedule in ("layer", "segment"):
        found = ours(warm, params, tokens, schedule, window=window, sinks=sinks)
        assert_close(f"window {window}, {sinks} sinks, {schedule}", found, expected)


@pytest.mark.parametrize(("window", "sinks", "max_distance"), CUT)
def test_distances_are_cut(warm, params, tokens, window, sinks, max_distance):
    """The Llama with attention of its own, which scores every pair of tokens at its distance and at the longest."""

    def attention(module, q_BHTK, k_BGTK, v_BGTK, attention_mask, scaling, **kwargs):
        t, K = q_BHTK.shape[2:]
        turns_K = module.config.rope_parameters["rope_theta"] ** (-torch.arange(0, K, 2).double() / K)
        k_BHTK, v_BHTK = (x.repeat_interleave(q_BHTK.shape[1] // x.shape[1], dim=1) for x in (k_BGTK, v_BGTK))

        def turned(x, position_T):
            (first, second), angle_TK = x.chunk(2, dim=-1), position_T[:, None] * turns_K
            cos, sin = angle_TK.cos(), angle_TK.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        position_T = torch.arange(t)
        scores = turned(q_BHTK, position_T) @ turned(k_BHTK, position_T).transpose(2, 3)
        longest = turned(q_BHTK, torch.full((t,), max_distance)) @ k_BHTK.transpose(2, 3)
        scores = torch.where(position_T[:, None] - position_T > max_distance, longest, scores) * scaling
        weights = scores.masked_fill(~torch.tensor(visible(t, window, sinks)), -torch.inf).softmax(-1)
        return (weights @ v_BHTK).transpose(1, 2), weights

    transformers.AttentionInterface.register("cut", attention)
    llama = transformers.LlamaForCausalLM.from_pretrained(LLAMA, attn_implementation="cut")
    expected = theirs(llama, tokens, position_ids=lambda t: torch.zeros(1, t, dtype=torch.long))  # not rotated before
    for schedule in ("layer", "segment"):
        rest = {"window": window, "sinks": sinks, "max_distance": max_distance}
        found = ours(warm, params, tokens, schedule, **rest)
        assert_close(f"window {window}, {sinks} sinks, cut at {max_distance}, {schedule}", found, expected)
    llama = transformers.LlamaForCausalLM.from_pretrained(LLAMA)
    mask = {"attention_mask": lambda t: torch.tensor(visible(t, window, sinks))[None, None]}
    assert np.abs(theirs(llama, tokens, **mask) - expected).max() > 0.1  # what is not cut


@pytest.mark.parametrize("max_distance", [None, 100])
def test_exported(warm, tokens, max_distance, tmp_path):
    """With a memory that says something: logits of 5 segments, and 100 tokens."""
    tensors, rng = load_file(warm / "params.safetensors"), np.random.default_rng(0)
    for name, x in tensors.items():
        if name.endswith("memory/read_output"):
            tensors[name] = (0.02 * rng.normal(size=x.shape)).astype(np.float32)
    changed = shutil.copytree(warm, tmp_path / "ours", ignore=shutil.ignore_patterns("params*"))
    save_file(tensors, changed / "params.safetensors")
    if max_distance:
        config = load_config(changed / "config.yaml", [f"model.max_distance={max_distance}"])
        (changed / "config.yaml").write_text(dump_config(config))
    convert("lm2_jax", "huggingface", changed, tmp_path / "theirs")
    model, params = lm2_jax.load(changed)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", trust_remote_code=True).eval()

    tokens_BST = tokens[: 5 * T].reshape(1, 5, T)
    memory = model.init_memory(1, params)
    expected = jax.jit(lambda params: run_segments(model, params, tokens_BST, memory)[0])(params)
    with torch.no_grad():
        found = exported(torch.tensor(tokens_BST).reshape(1, -1)).logits.numpy()
    assert_close(f"exported, cut at {model.spec.model.max_distance}", found, np.asarray(expected).reshape(found.shape))
    prompt = tokens[: 3 * T + 5].tolist()
    (expected,) = generate(model, params, [prompt], max_new_tokens=100)
    exported.generation_config.eos_token_id = None
    found = exported.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False)
    assert found[0, len(prompt) :].tolist() == expected
