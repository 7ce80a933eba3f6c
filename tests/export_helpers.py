"""Small random models of the code that an exported directory carries, without the way through JAX."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")

from lm2_jax.convert.huggingface_model.configuration_lm2 import LM2Config  # noqa: E402
from lm2_jax.convert.huggingface_model.modeling_lm2 import LM2ForCausalLM  # noqa: E402

torch.set_num_threads(1)  # models are so small that threads cost more than they give
V, T = 61, 8
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "segment_length": T,
    "memory_slots": 5,
}
KINDS = {
    "lm2": {"conv_width": 4, "memory_layers": 2},
    "lm2, independent gates": {"memory_width": 24, "memory_gates": "independent", "memory_slots": 40},
    "lm2, router": {"memory_write": "top_k", "memory_slots": 7},
    "armt": {"memory_kind": "armt", "memory_layers": 2, "conv_width": 4},
    "delta": {"memory_kind": "delta", "memory_layers": 2, "memory_width": 24},
    "rmt": {"memory_kind": "rmt", "conv_width": 4},
    "none": {"memory_kind": "none", "conv_width": 4},
    "lm2, window": {"conv_width": 4, "memory_layers": 2, "window": T, "sinks": 2, "max_distance": 11},
    "none, window": {"memory_kind": "none", "window": 5, "sinks": 3},
}
OFFICIAL = {"memory_kind": "official", "segment_length": 32, "memory_slots": 32}


def exported(kind, **settings):
    """A model in evaluation mode, large random weights; the same at every call."""
    torch.manual_seed(0)
    model = LM2ForCausalLM(LM2Config(**{**SIZES, **KINDS.get(kind, OFFICIAL), **settings}))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def works(function, *args, **kwargs):
    """Asserts that a call raises nothing, and returns what it returns."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def random_ids(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(ids, attention_mask=mask, **options)


def gradients(model, ids, **inputs):
    """The loss of predicting ids, and every parameter's gradient; None where it has none."""
    model.zero_grad()
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def logits_in_pieces(model, ids, size):
    cache, logits = None, []
    for piece in ids.split(size, dim=1):
        outputs = model(piece, past_key_values=cache)
        cache = outputs[1]
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)
