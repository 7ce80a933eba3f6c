"""PEFT's settings of low-rank additions (adapter_config.json) to and from our section model.lora."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lm2_jax.common.untrusted import short_repr
from lm2_jax.config import LoraConfig
from lm2_jax.convert.llama_config import number

PREFIX = "base_model.model."  # of every tensor: the modules that PEFT wraps a model in
# Settings with which W becomes something else than W + alpha / r · B A
_MUST_BE = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


def to_peft(lora: LoraConfig, names: Iterable[str], base: str | None) -> dict[str, Any]:
    """The settings of additions whose tensors have these names. base: name or path of the model they go onto."""
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    return {
        **_MUST_BE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }


def from_peft(theirs: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """rank and alpha; what is missing or not supported is added to `problems`."""
    for key, right in _MUST_BE.items():
        if theirs.get(key, right) != right:
            problems.append(f"{key}: found {short_repr(theirs[key])}; only {right!r} is supported")
    return {"rank": number(theirs, "r", problems), "alpha": number(theirs, "lora_alpha", problems)}
