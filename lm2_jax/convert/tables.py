"""Correspondence of tensors: one table for each foreign layout, read in both directions.

A parameter of ours is named by its path in the tree; inside the blocks by its path in a block, since ours are stacked
along a layer axis and theirs are numbered. Our weights are [in, out]; theirs are torch's, [out, in].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lm2_jax.model.lora import A, B


@dataclasses.dataclass(frozen=True)
class Rule:
    """Name and form of a parameter in a foreign state dict.

    Attributes:
      name: theirs; {layer} is the number of the block.
      transposed: theirs is [out, in].
      aliases: further names of the same tensor.
    """

    name: str
    transposed: bool = False
    aliases: tuple[str, ...] = ()

    def within(self, prefix: str) -> Rule:
        """The rule with a prefix before its names."""
        return dataclasses.replace(self, name=prefix + self.name, aliases=tuple(prefix + a for a in self.aliases))


@dataclasses.dataclass(frozen=True)
class Table:
    """A foreign layout.

    Attributes:
      rules: by our path, within a block for what is in the blocks.
      aliases_required: every alias is written, and required when reading; otherwise none is written, and one found in
        a file must equal its tensor.
    """

    rules: Mapping[str, Rule]
    aliases_required: bool = False


def _linear(name: str) -> Rule:
    return Rule(f"{name}.weight", transposed=True)


def _in_blocks(rules: Mapping[str, Rule], within: str = "", blocks: str = "model.layers") -> dict[str, Rule]:
    return {path: rule.within(f"{blocks}.{{layer}}.{within}") for path, rule in rules.items()}


# --- Hugging Face's Llama ------------------------------------------------------------------------------------------

_ATTENTION = {
    "attention/query": _linear("self_attn.q_proj"),
    "attention/key": _linear("self_attn.k_proj"),
    "attention/value": _linear("self_attn.v_proj"),
    "attention/output": _linear("self_attn.o_proj"),
}
_REST_OF_BLOCK = {
    "attention_norm/scale": Rule("input_layernorm.weight"),
    "mlp_norm/scale": Rule("post_attention_layernorm.weight"),
    "mlp/gate": _linear("mlp.gate_proj"),
    "mlp/up": _linear("mlp.up_proj"),
    "mlp/down": _linear("mlp.down_proj"),
}
_OUTSIDE_BLOCKS = {
    "embedding": Rule("model.embed_tokens.weight"),
    "final_norm/scale": Rule("model.norm.weight"),
    "head": Rule("lm_head.weight"),
}
_TIED = {**_OUTSIDE_BLOCKS, "embedding": Rule("model.embed_tokens.weight", aliases=("lm_head.weight",))}


def _llama(tied: bool) -> dict[str, Rule]:
    return {**(_TIED if tied else _OUTSIDE_BLOCKS), **_in_blocks(_ATTENTION), **_in_blocks(_REST_OF_BLOCK)}


def llama(tied: bool) -> Table:
    """`LlamaForCausalLM`; tied: the head is the embedding."""
    return Table(_llama(tied))


# --- llama.cpp's Llama ---------------------------------------------------------------------------------------------

_GGUF_BLOCK = {
    "attention/query": _linear("attn_q"),
    "attention/key": _linear("attn_k"),
    "attention/value": _linear("attn_v"),
    "attention/output": _linear("attn_output"),
    "attention_norm/scale": Rule("attn_norm.weight"),
    "mlp_norm/scale": Rule("ffn_norm.weight"),
    "mlp/gate": _linear("ffn_gate"),
    "mlp/up": _linear("ffn_up"),
    "mlp/down": _linear("ffn_down"),
}


def gguf(tied: bool) -> Table:
    """A GGUF file of architecture llama, in which a tied model has no `output.weight`."""
    outside = {"embedding": Rule("token_embd.weight"), "final_norm/scale": Rule("output_norm.weight")}
    head = {} if tied else {"head": Rule("output.weight")}
    return Table({**outside, **head, **_in_blocks(_GGUF_BLOCK, blocks="blk")})


# --- The official code ---------------------------------------------------------------------------------------------

OFFICIAL_MEMORY = {
    "memory/query": _linear("query_proj"),
    "memory/query_bias": Rule("query_proj.bias"),
    "memory/key": _linear("key_proj"),
    "memory/key_bias": Rule("key_proj.bias"),
    "memory/value": _linear("value_proj"),
    "memory/value_bias": Rule("value_proj.bias"),
    "memory/mlp": Rule("attention_mlp.0.weight", True, ("attention_mlp.1.weight",)),
    "memory/mlp_bias": Rule("attention_mlp.0.bias", aliases=("attention_mlp.1.bias",)),
    "memory/norm_1": Rule("attended_memory_layernorm.weight"),
    "memory/norm_1_bias": Rule("attended_memory_layernorm.bias"),
    "memory/norm_2": Rule("attended_memory_layernorm2.weight"),
    "memory/norm_2_bias": Rule("attended_memory_layernorm2.bias"),
    "memory/token_gate_scale": Rule("input_gate_projector.w"),
    "memory/token_gate": _linear("input_gate_projector.linear"),
    "memory/token_gate_bias": Rule("input_gate_projector.linear.bias"),
    "memory/bank_gate": _linear("memory_gate_projector.linear"),
    "memory/bank_gate_bias": Rule("memory_gate_projector.linear.bias"),
    "memory/input_bias": Rule("input_bias"),
    "memory/forget_bias": Rule("forget_bias"),
}


def official(tied: bool, with_memory: bool) -> Table:
    """The official state dict, in which a block with memory holds its self-attention under two names."""
    rules = _llama(tied)
    if with_memory:
        twice = {p: dataclasses.replace(r, aliases=(f"mem_attn.{r.name}",)) for p, r in _ATTENTION.items()}
        rules |= _in_blocks(twice) | _in_blocks(OFFICIAL_MEMORY, "mem_attn.memory_module.")
    return Table(rules, aliases_required=True)


# --- Our own modelling code for transformers -----------------------------------------------------------------------

_LM2_MATRICES = (
    "read_query",
    "read_key",
    "read_value",
    "read_output",
    "output_gate",
    "write_query",
    "write_key",
    "write_value",
    "write_output",
    "candidate_up",
    "candidate_down",
    "forget_gate",
    "forget_gate_bank",
    "input_gate",
    "input_gate_bank",
    "router",
)
_LM2_NORMS = ("bank_norm", "candidate_norm", "candidate_norm_2")
_LM2_VECTORS = ("output_gate_bias", "forget_gate_bias", "input_gate_bias")
_LM2_MEMORY = {
    **{f"memory/{name}": _linear(name) for name in _LM2_MATRICES},
    **{f"memory/{name}": Rule(f"{name}.weight") for name in _LM2_NORMS},
    **{f"memory/{name}": Rule(name) for name in _LM2_VECTORS},
}


# What can be added to a Llama: while STARTS_AT_ZERO are zero, its logits do not change
_CONVOLUTION = {"conv_norm/scale": Rule("conv_norm.weight"), "conv/kernel": Rule("conv.weight")}
CAN_BE_ADDED = {*_CONVOLUTION, *_LM2_MEMORY}
STARTS_AT_ZERO = ("memory/read_output", "conv/kernel")


# Kinds armt and delta, besides query, key and value, which are named as in the official code
_LATER_MEMORIES = {
    **{f"memory/{name}": _linear(f"{name}_proj") for name in ("beta", "decay", "gate", "output")},
    **{f"memory/{name}": Rule(name) for name in ("beta_bias", "decay_bias", "decay_rate_bias")},
    "memory/output_norm": Rule("output_norm.weight"),
}


def _as_one_tensor(rule: Rule) -> Rule:
    """The weight that the official code applies twice has one name here."""
    return dataclasses.replace(rule, name=rule.name.replace("attention_mlp.0.", "attention_mlp."), aliases=())


def lm2(tied: bool) -> Table:
    """`modeling_lm2.py`, of every kind."""
    official_memory = {path: _as_one_tensor(rule) for path, rule in OFFICIAL_MEMORY.items()}
    return Table(
        {
            **_llama(tied),
            **_in_blocks(_CONVOLUTION),
            **_in_blocks(_LM2_MEMORY, "memory."),
            **_in_blocks(official_memory | _LATER_MEMORIES, "memory."),
            "memory_tokens": Rule("model.start_memory.tokens"),
        }
    )


# Low-rank additions (model/lora.py), as PEFT names them: a module's A and B are its inputs' and its outputs' half
def _additions(rule: Rule, path: str) -> dict[str, Rule]:
    module = rule.name.removesuffix(".weight")
    if path == "embedding":
        a, b = Rule(f"{module}.lora_embedding_A", True), Rule(f"{module}.lora_embedding_B", True)
    elif rule.transposed:
        a, b = Rule(f"{module}.lora_A.weight", True), Rule(f"{module}.lora_B.weight", True)
    else:  # the head, which is [out, in] here, too
        a, b = Rule(f"{module}.lora_B.weight"), Rule(f"{module}.lora_A.weight")
    return {path + A: a, path + B: b}


def adapter(tied: bool) -> Table:
    """`modeling_lm2.py`, with low-rank additions beside the weights that can have them."""
    rules = lm2(tied).rules
    can_have = [path for path in _llama(tied) if not path.endswith("norm/scale")]
    return Table({**rules, **{name: rule for path in can_have for name, rule in _additions(rules[path], path).items()}})


LM2_START_BANK = "model.start_memory.bank"  # no parameter of ours: the bank at a text's start
# Names in directories that an earlier version of modeling_lm2.py reads
LM2_FORMER_NAMES = {
    "model.initial_bank": LM2_START_BANK,
    "model.memory_bank": LM2_START_BANK,
    "model.memory_tokens": "model.start_memory.tokens",
}
