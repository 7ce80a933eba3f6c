"""An adapter of lm2_jax: what was trained, to be put onto the Llama whose other weights stayed as they were.

It holds weights under the names of modeling_lm2.py and low-rank additions under those of PEFT: beside a module's weight
[out,in] are lora_A [r,in] and lora_B [out,r], beside an embedding [V,D] lora_embedding_A [r,V] and lora_embedding_B
[D,r]. The weight becomes weight + alpha / r · B A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .configuration_lm2 import LM2Config

State = dict[str, Tensor]
FILE = "adapter_model.safetensors"
PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


def read_adapter(adapter: str) -> tuple[LM2Config, dict[str, object], State]:
    """The config of the whole model, the adapter's settings and its tensors; from a directory or the hub."""
    config, tensors = LM2Config.from_pretrained(adapter), load_file(cached_file(adapter, FILE))
    settings = getattr(config, "adapter", None)
    if settings is None:
        raise ValueError(f"{adapter}/config.json: adapter: is missing; expected what lm2_jax wrote there")
    del config.adapter  # the whole model is none
    return config, settings, tensors


def put_onto(whole: PreTrainedModel, base: PreTrainedModel, adapter: State, settings: Mapping[str, object]) -> State:
    """The tensors of the whole model, which may be empty. Raises ValueError, naming everything that does not fit."""
    shapes, theirs = {name: tensor.shape for name, tensor in whole.state_dict().items()}, base.state_dict()
    if whole.config.tie_word_embeddings and base.config.tie_word_embeddings:
        del shapes["lm_head.weight"], theirs["lm_head.weight"]
    halves = {name: tensor for name, tensor in adapter.items() if ".lora_" in name}
    weights = {name: tensor for name, tensor in adapter.items() if name not in halves}
    frozen = {name: tensor for name, tensor in theirs.items() if name not in weights}
    state, additions = frozen | weights, {}
    for name in shapes:
        module = name.removesuffix(".weight")
        for a, b in PAIRS:
            if module + a in halves and module + b in halves:
                product = halves.pop(module + b).float() @ halves.pop(module + a).float()
                additions[name] = product.T if "embedding" in a else product

    problems = [f"{name}: is missing; expected {list(shapes[name])}" for name in shapes if name not in state]
    problems += [f"{name}: is not a tensor of this model" for name in (*state, *halves) if name not in shapes]
    problems += [
        f"{name}: found {list(found[name].shape)}; expected {list(shape)}"
        for found in (state, additions)
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise ValueError("adapter and base do not fit:\n" + "\n".join(f"  {problem}" for problem in problems))
    if digest(frozen) != settings["base_sha256"]:
        raise ValueError(f"this base has other weights than the one the adapter was trained on, {settings['base']}")

    for name, product in additions.items():
        state[name] = state[name].float() + settings["lora_alpha"] / settings["lora_rank"] * product
    return state


def digest(tensors: State) -> str:
    """SHA-256 of tensors as bfloat16 has them: the same for a base in float32 and in bfloat16."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
