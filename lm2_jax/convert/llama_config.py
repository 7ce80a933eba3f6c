"""Hugging Face's Llama settings (config.json) to and from our model section."""

from __future__ import annotations

from typing import Any

from lm2_jax.common.untrusted import short_repr
from lm2_jax.config import LARGEST, Config

LLAMAS = ("llama", "mistral")  # values of model_type; a Mistral is a Llama with a window
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_MUST_BE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_MOST = {"num_hidden_layers": 4096}  # bounds what a hostile config can make us do


def from_llama(theirs: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Sections `model` and `data` of a config; what is missing or not supported is added to `problems`."""
    for key, right in _MUST_BE.items():
        if theirs.get(key, right) != right:
            problems.append(f"{key}: found {short_repr(theirs[key])}; only {right!r} is supported")
    tied = theirs.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings: found {short_repr(tied)}; expected true or false")
    heads = number(theirs, "num_attention_heads", problems)
    head_dim = number(theirs, "head_dim", problems, default=0)
    if not head_dim and heads:
        head_dim = number(theirs, "hidden_size", []) // heads
    theta, scaling = _rope(theirs, problems)
    model = {
        "vocab_size": number(theirs, "vocab_size", problems),
        "d_model": number(theirs, "hidden_size", problems),
        "num_layers": number(theirs, "num_hidden_layers", problems),
        "num_heads": heads,
        "num_kv_heads": number(theirs, "num_key_value_heads", problems, default=heads),
        "head_dim": head_dim,
        "d_ff": number(theirs, "intermediate_size", problems),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": number(theirs, "rms_norm_eps", problems, default=1e-6),
        "tie_embeddings": bool(tied),
    }
    # A template: the tokens or the text to train on are the user's
    return {"model": model, "data": {"source": "bin", "path": ["tokens/*.bin"], "boundaries": "stream"}}


def to_llama(config: Config) -> dict[str, Any]:
    """Hugging Face's names of our model section; RoPE in the form that every version of transformers reads."""
    c = config.model
    scaling = c.rope_scaling and {"rope_type": "llama3"} | {key: getattr(c.rope_scaling, key) for key in _SCALING}
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.attention_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
    }


def rope_parameters(settings: dict[str, Any]) -> dict[str, Any]:
    """RoPE in the form of transformers 5, of settings in the older form (rope_theta, rope_scaling)."""
    return {"rope_type": "default", "rope_theta": settings["rope_theta"]} | (settings["rope_scaling"] or {})


def number(theirs: dict[str, Any], key: str, problems: list[str], default: float | None = None) -> Any:
    """A positive number of the config; without one, 1 and a problem."""
    value, most = theirs.get(key), _MOST.get(key, LARGEST)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value <= most or value == default):
        problems.append(f"{key}: found {short_repr(value)}; expected a positive number up to {most:,}")
        return 1
    return value


def _rope(theirs: dict[str, Any], problems: list[str]) -> tuple[float, dict[str, Any] | None]:
    """theta and scaling, from rope_parameters (transformers 5), or rope_theta and rope_scaling (before it).

    A config may have both forms, for readers of any version, but they must agree.
    """
    thetas = {"rope_theta": theirs["rope_theta"]} if theirs.get("rope_theta") is not None else {}
    scalings: dict[str, dict[str, Any] | None] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = theirs.get(key) or {}
        if not isinstance(rope, dict):
            problems.append(f"{key}: found {short_repr(rope)}; expected an object")
            continue
        if rope.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
        if rope:
            scalings[key] = _scaling(rope, key, problems)
    for found in (thetas, scalings):
        (first, value), *others = found.items() or [("", None)]
        problems += [
            f"{first} and {other}: found {short_repr(value)} and {short_repr(differing)}; remove the one that is wrong"
            for other, differing in others
            if differing != value
        ]
    theta = number({"rope_theta": next(iter(thetas.values()), None)}, "rope_theta", problems, default=10_000.0)
    return theta, next(iter(scalings.values()), None)


def _scaling(rope: dict[str, Any], key: str, problems: list[str]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        return {name: number(rope, name, problems) for name in _SCALING}
    if kind != "default":
        problems.append(f"{key}: found rope_type {short_repr(kind)}; only 'default' and 'llama3' are supported")
    return None
