"""GGUF files as llama.cpp's converter writes them, of random Llamas and trained tokenizers."""

import io
import json
import math

import numpy as np
import pytest
from convert_helpers import torch, transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

gguf = pytest.importorskip("gguf", reason="gguf is not installed (requirements-dev.txt)")

Kind = gguf.GGMLQuantizationType
PROSE = (
    "The white whale swam; the ship's boats weren't near it, 12345 times!\r\n\n   'Twas DON'T day_one.\t\n"
    "  1851 (in   7 days) Some years ago, having little or no money in my purse, I thought I would sail about a little "
    "and see the watery part of the world."
)
TEXT = PROSE + (
    " caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \u0420\u0443\u0441 \u05e9\u05dc\u05d5\u05dd \u0967\u0968 \ufb01 "
    "\U0001f469\u200d\U0001f467 <|eot_id|>  end "
)
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# What the models' own tokenizer.json says for each tokenizer.ggml.pre
WORDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), _LETTERS]),
}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "low_freq_factor": 1.0}
LLAMA31 = LLAMA3 | {"factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
OTHER_LLAMA3 = LLAMA3 | {
    "rope_theta": 100.0,
    "factor": 5.0,
    "high_freq_factor": 7.0,
    "original_max_position_embeddings": 96,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def byte_level(words="gpt-2", ignore_merges=False):
    """A small byte-level BPE with three special tokens at its end; ignore_merges: and a word that no merge makes."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = WORDS[words], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    if ignore_merges:
        parts = json.loads(tokenizer.to_str())
        parts["model"]["merges"] = [pair for pair in parts["model"]["merges"] if "".join(pair) != "Ġthe"]
        tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def gpt2_settings(tokenizer, pre="gpt-2"):
    """tokenizer.ggml.* of a byte-level BPE."""
    tokens = [tokenizer.id_to_token(id) for id in range(tokenizer.get_vocab_size())]
    merges = (tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"])
    bos, eos, eot = map(tokenizer.token_to_id, SPECIAL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.eot_token_id": eot,
        "tokenizer.chat_template": "{{ messages }}",
    }


def sentencepiece():
    """A small BPE of sentencepiece with bytes for unknown letters, as Llama 2's."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines() * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=343,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["day_one"],
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def spm_settings(processor):
    """tokenizer.ggml.* of a model of sentencepiece, with no ids: 0 is <unk>, 1 <s> and 2 </s>."""
    ids = range(processor.vocab_size())
    types = {id: 3 if processor.is_control(id) else 6 if processor.is_byte(id) else 1 for id in ids}
    types |= {processor.unk_id(): 2, processor.piece_to_id("day_one"): 4}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": [float(processor.get_score(id)) for id in ids],
        "tokenizer.ggml.token_type": [types[id] for id in ids],
    }


def random_llama(rope=PLAIN, tied=False, vocab_size=343):
    """A LlamaForCausalLM with large random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        max_position_embeddings=256,
        initializer_range=0.2,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config).eval()


def llama_settings(llama):
    """The settings of the model."""
    c = llama.config
    return {
        "general.name": "Tiny",
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.freq_base": c.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": c.head_dim,
        "llama.vocab_size": c.vocab_size,
    }


def llama_tensors(llama, kind=Kind.F32):
    """Tensors by name: (numbers or blocks, type). Rounds the Llama's own weights to what the type can hold."""
    c, tensors = llama.config, {}
    for name, weight in llama.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        quantised = Kind.F32 if weight.ndim == 1 else kind
        blocks = gguf.quantize(weight.numpy(), quantised)
        weight.copy_(torch.tensor(gguf.dequantize(blocks, quantised)))
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "attn_q" in name or "attn_k" in name:
            heads = c.num_attention_heads if "attn_q" in name else c.num_key_value_heads
            blocks = _pairs_side_by_side(blocks, heads)
        tensors[name] = (blocks, quantised)
    if c.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = (rope_divisors(c.rope_parameters, c.head_dim), Kind.F32)
    return tensors


def write_gguf(path, settings, tensors, architecture="llama"):
    """Writes a file of settings and tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def rope_divisors(rope, head_dim):
    """Divisors of the frequencies, one by one as llama.cpp's converter computes them."""
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for frequency in 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim):
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(divisors, np.float32)


def _pairs_side_by_side(rows, heads):
    """Rows of each head in the order 0, K/2, 1, K/2 + 1, ..."""
    K = len(rows) // heads
    order = [head * K + half * K // 2 + i for head in range(heads) for i in range(K // 2) for half in (0, 1)]
    return rows[order]
