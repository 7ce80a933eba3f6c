"""Exported models with a window over segment edges: equal to ours, packed or alone, token by token, and back again."""

import json

import jax
import numpy as np
import optax
import pytest
from convert_helpers import (
    V,
    assert_same_tensors,
    convert,
    left_padded,
    random_own,
    random_tokens,
    torch,
    torch_logits,
    with_keys,
)
from export_helpers import exported, greedy, random_ids, works
from safetensors.numpy import load_file

import lm2_jax
from lm2_jax.common.errors import UserError
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
# Kind `none` with a window alone is a Mistral, and needs no code of ours
MODELS = [
    *(("lm2", window) for window in WINDOWS),
    *(("none", window) for window in WINDOWS if window["sinks"]),
    ("none with convolution", {"window": 5}),
]
SETTINGS = {
    "lm2": ("memory.num_layers=1",),
    "none": ("memory.kind=none",),
    "none with convolution": ("memory.kind=none", "model.conv_width=4"),
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(map(str, (model[0], *model[1].values()))))
def pair(request, tmp_path_factory):
    """(our directory, our model and parameters, the same in transformers)."""
    path, (kind, window) = tmp_path_factory.mktemp("pair"), request.param
    settings = (*SETTINGS[kind], *(f"model.{key}={value}" for key, value in window.items()))
    ours = random_own(path / "ours", f"data.segment_length={T}", "model.embedding_std=0.5", *settings, noise=0.15)
    theirs = convert("lm2_jax", "huggingface", ours, path / "theirs")
    return ours, *lm2_jax.load(ours), LM2ForCausalLM.from_pretrained(theirs).eval()


def logits_of(model, params, tokens_BST, **documents):
    run = jax.jit(lambda params, tokens_BST: run_segments(model, params, tokens_BST, memory, **documents)[0])
    memory = model.init_memory(len(tokens_BST), params)
    return np.asarray(run(params, tokens_BST)).reshape(len(tokens_BST), -1, V)


def test_logits_of_documents(pair):
    """Of several segments and of one token; alone, as rows with padding on either side, and packed into one row."""
    _, model, params, theirs = pair
    tokens_BC, lengths = random_tokens((5, S * T)), (S * T, 19, 8, 27, 1)
    real_BC = np.arange(S * T) < np.array(lengths)[:, None]
    expected = logits_of(
        model,
        params,
        tokens_BC.reshape(5, S, T),
        document_BST=real_BC.reshape(5, S, T).astype(np.int32),
        reset_BS=np.zeros((5, S), bool),
    )[real_BC]

    found = torch_logits(theirs, tokens_BC, attention_mask=torch.tensor(real_BC))[real_BC]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    left = [np.roll(x, -n, axis=0) for x, n in zip(tokens_BC, lengths, strict=True)]
    found = torch_logits(theirs, left, attention_mask=torch.tensor(real_BC[:, ::-1].copy()))[real_BC[:, ::-1]]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    found = torch_logits(theirs, tokens_BC[real_BC][None], position_ids=position)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    alone = [torch_logits(theirs, x[None, :n])[0] for x, n in zip(tokens_BC, lengths, strict=True)]
    np.testing.assert_allclose(np.concatenate(alone), expected, atol=1e-4)


def test_generate_is_ours(pair):
    """100 tokens over segment ends: alone, and in a left-padded batch."""
    _, model, params, theirs = pair
    prompts = [random_tokens(length, seed).tolist() for seed, length in enumerate((3 * T + 5, 7))]
    expected = generate(model, params, prompts, max_new_tokens=100)
    batch, mask = left_padded(prompts)
    assert greedy(theirs, batch, mask, max_new_tokens=100)[:, batch.shape[1] :].tolist() == expected
    assert greedy(theirs, torch.tensor(prompts[1:]), max_new_tokens=100)[0, 7:].tolist() == expected[1]


def test_there_and_back(pair, tmp_path):
    """To the bit, with the window; and as transformers saves it again."""
    ours, _, _, theirs = pair
    theirs.save_pretrained(tmp_path / "saved")
    convert("huggingface", "lm2_jax", tmp_path / "saved", tmp_path / "back")
    assert_same_tensors(*(load_file(path / "params.safetensors") for path in (tmp_path / "back", ours)))
    before, after = (load_config(path / "config.yaml") for path in (ours, tmp_path / "back"))
    assert after.model.window
    for key in ("window", "sinks", "max_distance", "conv_width"):
        assert getattr(before.model, key) == getattr(after.model, key)


def test_gradients_are_ours(tmp_path):
    """Of the last segment's loss, which comes from before it over all edges and through the bank."""
    settings = ("model.window=5", "model.sinks=2", "model.max_distance=9", "model.embedding_std=0.5")
    ours = random_own(tmp_path / "ours", f"data.segment_length={T}", *settings, noise=0.15)
    theirs = LM2ForCausalLM.from_pretrained(convert("lm2_jax", "huggingface", ours, tmp_path / "theirs"))
    model, params = lm2_jax.load(ours)
    tokens = random_tokens((2, 3 * T))
    labels = torch.tensor(tokens).long()
    labels[:, : 2 * T + 1] = -100
    theirs(torch.tensor(tokens), labels=labels).loss.backward()

    def objective(params):
        logits, _ = run_segments(model, params, tokens.reshape(2, 3, T), model.init_memory(2, params))
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, -1, :-1], tokens[:, 2 * T + 1 :]).mean()

    expected = jax.jit(jax.grad(objective))(params)["bank_blocks"]["attention"]
    for layer in (0, 1):
        for name in ("query", "key", "value"):
            found = getattr(theirs.model.layers[layer].self_attn, f"{name[0]}_proj").weight.grad.T
            np.testing.assert_allclose(found, expected[name][layer], atol=1e-5 + 1e-3 * found.abs().max())


# --- Documents that JAX packs into segments --------------------------------------------------------------------------


@pytest.mark.parametrize("window", [{"window": T, "sinks": 3}, {"window": 5, "sinks": 2, "max_distance": 7}])
def test_segments_of_packed_documents(window, tmp_path):
    """Without memory it does not matter where a segment's edge cuts a document."""
    settings = ("memory.kind=none", *(f"model.{key}={value}" for key, value in window.items()))
    ours = random_own(tmp_path / "ours", f"data.segment_length={T}", "model.embedding_std=0.5", *settings)
    theirs = LM2ForCausalLM.from_pretrained(convert("lm2_jax", "huggingface", ours, tmp_path / "theirs")).eval()
    lengths, tokens = (6, 17, 9, 8), random_tokens((1, S * T))
    begins = np.isin(np.arange(S * T), np.cumsum((0, *lengths[:-1]))).reshape(1, S, T)
    reset = begins[:, :, 0]
    document = (begins.cumsum(-1) + ~reset[..., None]).astype(np.int32)
    expected = logits_of(*lm2_jax.load(ours), tokens.reshape(1, S, T), document_BST=document, reset_BS=reset)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    np.testing.assert_allclose(torch_logits(theirs, tokens, position_ids=position), expected, atol=1e-4)


# --- Long texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lm2", "none"])
@torch.no_grad()
def test_no_angle_grows_with_the_text(kind):
    """After eighty tokens or eighty million, the same text gives the same logits, to the bit."""
    model, ids = exported(kind, conv_width=0, window=5, sinks=2, max_distance=9), random_ids(2, 2 * T + 3)
    logits = []
    for read in (80, 8 * 10**7):
        cache = works(model, random_ids(2, 80, seed=1))[1]
        cache.read = [read]
        logits.append(model(ids, past_key_values=cache).logits)
    assert torch.equal(*logits)


@torch.no_grad()
def test_the_state_does_not_grow_with_the_text():
    model = exported("lm2", window=T, sinks=2)
    sizes = []
    for length in (2 * T, 20 * T):
        blocks = model(random_ids(2, length))[1].blocks
        sizes.append([None if x is None else x.shape for block in blocks for x in block])
    assert sizes[0] == sizes[1]
    assert exported("lm2")(random_ids(2, 2 * T))[1].blocks[0].edge_keys is None


# --- Settings --------------------------------------------------------------------------------------------------------


def test_transformers_is_told_of_no_window_of_its_own(tmp_path):
    """A config with a key sliding_window gets caches that forget (transformers 5.24)."""
    ours = random_own(tmp_path / "ours", "model.window=8", "model.sinks=2", "model.max_distance=20")
    settings = json.loads((convert("lm2_jax", "huggingface", ours, tmp_path / "theirs") / "config.json").read_text())
    assert (settings["window"], settings["sinks"], settings["max_distance"]) == (8, 2, 20)
    assert not [key for key in LM2Config(**settings).to_dict() if "sliding" in key]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sinks": 2}, "sinks is 2, should be 0 without a window"),
        ({"max_distance": 9}, "max_distance is 9, should be None without a window"),
        ({"window": 1}, "window is 1, should be 2 to segment_length"),
        ({"window": 33}, "window is 33, should be 2 to segment_length"),
        ({"window": 4, "sinks": 4}, "sinks is 4, should be at least 0 and below the window"),
        ({"window": 4, "max_distance": 2}, "max_distance is 2, should be at least window - 1"),
        ({"window": 4, "memory_kind": "rmt"}, "memory_kind is 'rmt', should be lm2 or none with a window"),
    ],
)
def test_windows_that_cannot_be(settings, said, tmp_path):
    """In transformers, and in the config.json of a directory that is converted back."""
    with pytest.raises(ValueError, match=f"LM2Config: {said}"):
        LM2Config(**settings)
    ours = random_own(tmp_path / "ours", "data.segment_length=32", "memory.num_slots=16")
    path = convert("lm2_jax", "huggingface", ours, tmp_path / "theirs")
    with_keys(**settings)(path)
    with pytest.raises(UserError, match=r"model\.(window|sinks|max_distance)"):
        convert("huggingface", "lm2_jax", path, tmp_path / "back")
