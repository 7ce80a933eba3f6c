"""Models to convert: random ones of ours, and of Hugging Face's Llama."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import random_params

from lm2_jax import convert_checkpoint
from lm2_jax.config import parse_config
from lm2_jax.convert import directory, engine
from lm2_jax.model import build_model

torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")

GOLDEN = Path(__file__).parent / "data" / "golden"
V = 61
OFFICIAL = ("memory={kind: official, num_slots: 32, num_heads: 4}", "data.segment_length=32")


def convert(source, target, path, output, *overrides, dtype="float32"):
    convert_checkpoint.convert(source, target, Path(path), Path(output), dtype, list(overrides))
    return Path(output)


def own_directory(path, config, params):
    """A converted directory of these parameters."""
    checkpoint = engine.Checkpoint(config, engine.from_arrays(params, path))
    with directory.new_directory(path) as partial:
        directory.write(checkpoint, partial, lambda items, title: items)
    return path


def random_own(path, *overrides, noise=0.3, seed=0):
    """A converted directory of a model away from its initialisation."""
    base = ("model.d_model=32", "model.d_ff=48", "model.num_layers=2", "model.num_kv_heads=2", "memory.num_slots=5")
    where = ("data.source=bin", "data.path=x.bin", "data.segment_length=16")
    config = parse_config("", (f"model.vocab_size={V}", *where, *base, *overrides))
    return own_directory(path, config, random_params(build_model(config), noise, seed))


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
        assert array.tobytes() == expected[name].tobytes(), name


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMAS = {
    "tied, grouped": {"tie_word_embeddings": True, "num_key_value_heads": 2, "rope_parameters": PLAIN},
    "untied, llama3 scaling": {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_parameters": LLAMA3},
    "tied, llama3 scaling": {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": LLAMA3},
    "sharded, heads of another width": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 2,
        "rope_parameters": PLAIN,
        "head_dim": 16,
    },
}


def random_llama(path, name="untied, llama3 scaling", seed=0, std=0.25, **save):
    """A LlamaForCausalLM with large random weights, saved."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=V, max_position_embeddings=256, initializer_range=std, **sizes, **LLAMAS[name]
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(path, **save)
    return llama


def torch_logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)), **kwargs).logits.float().numpy()


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def left_padded(prompts):
    """Prompts of unequal length as ids and mask [B,C]."""
    longest = max(map(len, prompts))
    return (
        torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    )


def with_keys(**changes):
    """Damage to config.json; None takes a key out."""

    def damage(path):
        settings = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return damage
