"""GGUF files of Llamas: their settings and small files in Hugging Face's terms, their tensors by a table.

Whatever would make another model of one is refused by name: other architectures, experts, windows, scalings of RoPE
that are not Llama 3's, and every setting of the model that is not known here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import short_repr
from lm2_jax.convert.engine import Checkpoint, Track
from lm2_jax.convert.gguf_file import open_gguf
from lm2_jax.convert.gguf_tokenizer import write_tokenizer
from lm2_jax.convert.huggingface import ForeignLlama, read_llama
from lm2_jax.convert.llama_config import number
from lm2_jax.convert.tables import gguf
from lm2_jax.convert.tensors import Tensor
from lm2_jax.tokenizer import CARD

_ARCHITECTURE = "llama"
_THETA = 10_000.0  # of RoPE, where a file gives none
# Hugging Face's names of settings under "llama."; without an optional one, both formats take the same default
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
_REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
# Settings that may only say what is so anyway
_MUST_BE = {
    "general.type": ("model",),
    "general.quantization_version": (2,),
    "split.count": (0, 1),
    "llama.attention.causal": (True,),
    "llama.attention.sliding_window": (0,),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.rope.scaling.type": ("none",),
}
_SAY_NOTHING = {"llama.tensor_data_layout"}
# Mistral 7B v0.1 and its descendants: files of architecture llama, which do not mention its window
_WINDOWED = {
    "block_count": 32,
    "embedding_length": 4096,
    "feed_forward_length": 14336,
    "attention.head_count_kv": 8,
    "rope.freq_base": _THETA,
}
_WINDOWED_NAME = re.compile(r"mistral|ministral|mixtral", re.IGNORECASE)
_NAMES = re.compile(r"general\.(name|basename|finetune|organization|tags|base_model\..*)")
_ROPE_DIVISORS = "rope_freqs.weight"
_LLAMA3 = (1.0, 4.0, 8192)  # low and high frequency factor and original length of all that Meta published


def read(path: Path, files: Path, overrides: Sequence[str], track: Track) -> Checkpoint:
    """Opens a GGUF file of a Llama.

    files: an empty directory for the small files that the result refers to; it must outlive the result. Raises
    UserError with all that is missing, unknown, mis-shaped, not finite, or not supported.
    """
    settings, tensors = open_gguf(path)
    theirs = _settings(settings, tensors, path)
    tokenizer_ids = write_tokenizer(settings, files, path)
    (files / "config.json").write_text(json.dumps(theirs | tokenizer_ids, indent=2) + "\n", encoding="utf-8")
    _write_card(settings.get("general.license"), files)
    queries, keys = theirs["num_attention_heads"], theirs.get("num_key_value_heads", theirs["num_attention_heads"])
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", name):
            tensors[name] = _with_halves_apart(tensor, queries if found[1] == "q" else keys)
    return read_llama(ForeignLlama(path, path, theirs, tensors, gguf, files), overrides, track)


def _write_card(licence: Any, files: Path) -> None:
    """Writes the licence that a file states where a model card would state it."""
    if isinstance(licence, str):
        (files / CARD).write_text(f"---\n{json.dumps({'license': licence})}\n---\n", encoding="utf-8")


def _with_halves_apart(tensor: Tensor, heads: int) -> Tensor:
    """A query or key matrix whose head rotates row i with row i + K/2; in the file, with its neighbour."""
    if tensor.shape[0] % (2 * heads):  # refused for its shape later
        return tensor
    rows = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return tensor._replace(read=lambda row=None: tensor.read(rows if row is None else rows[row]))


# --- Settings ------------------------------------------------------------------------------------------------------


def _settings(settings: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Hugging Face's settings of the model; takes the divisors of RoPE out of the tensors. Raises UserError."""
    if (architecture := settings.get("general.architecture")) != _ARCHITECTURE:
        raise UserError(
            f"{path}: general.architecture: found {short_repr(architecture)}; only {_ARCHITECTURE!r} is supported"
        )
    problems: list[str] = []
    theirs = {"model_type": "llama", "tie_word_embeddings": "output.weight" not in tensors}
    theirs |= _numbers(settings, problems)
    embedding, tokens = tensors.get("token_embd.weight"), settings.get("tokenizer.ggml.tokens")
    theirs["vocab_size"] = embedding.shape[0] if embedding else number(settings, "llama.vocab_size", problems)
    if isinstance(tokens, list) and len(tokens) != theirs["vocab_size"]:
        problems.append(f"tokenizer.ggml.tokens: found {len(tokens)}; the embedding has {theirs['vocab_size']} rows")
    head_dim = theirs.get("head_dim", theirs["hidden_size"] // theirs["num_attention_heads"])
    problems += _unsupported(settings, head_dim, theirs["vocab_size"])
    if divisors := tensors.pop(_ROPE_DIVISORS, None):
        theirs["rope_scaling"] = _llama3_scaling(divisors.read(), theirs.get("rope_theta", _THETA), head_dim)
        if theirs["rope_scaling"] is None:
            problems.append(f"{_ROPE_DIVISORS}: is not the scaling of Llama 3, the only one that is supported")
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return theirs


def _numbers(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The numbers of `_REQUIRED` and `_OPTIONAL`; what is missing or none is added to `problems`."""
    theirs = {}
    for key, name in (_REQUIRED | _OPTIONAL).items():
        if key in _REQUIRED or f"llama.{key}" in settings:
            theirs[name] = number(settings, f"llama.{key}", problems)
            if key not in _REAL and not isinstance(theirs[name], int):
                problems.append(f"llama.{key}: found {theirs[name]}; expected a whole number")
    return theirs


def _unsupported(settings: Mapping[str, Any], head_dim: int, vocab_size: int) -> list[str]:
    """A problem for every setting of the model that is not known, or says what is not supported."""
    must_be = _MUST_BE | {
        "llama.attention.value_length": (head_dim,),
        "llama.rope.dimension_count": (head_dim,),
        "llama.vocab_size": (vocab_size,),
    }
    known = must_be.keys() | {f"llama.{key}" for key in _REQUIRED | _OPTIONAL} | _SAY_NOTHING
    problems = []
    for key, value in settings.items():
        if value not in must_be.get(key, (value,)):
            right = " or ".join(map(repr, must_be[key]))
            problems.append(f"{key}: found {short_repr(value)}; only {right} is supported")
        elif key.startswith("llama.") and key not in known:
            problems.append(f"{key}: found {short_repr(value)}; this setting is not supported")
    if sign := _sign_of_a_window(settings):
        problems.append(
            f"{sign}: Mistral's models attend to a window, which the file does not give; they are not supported"
        )
    return problems


def _sign_of_a_window(settings: Mapping[str, Any]) -> str | None:
    """The sign of a window that the file has no setting for: a name, or sizes of a model with one. None: no sign."""
    for key in filter(_NAMES.fullmatch, settings):
        if _WINDOWED_NAME.search(str(settings[key])):
            return f"{key}: found {short_repr(settings[key])}"
    found = {"llama.rope.freq_base": _THETA, **settings}
    if all(found.get(f"llama.{key}") == value for key, value in _WINDOWED.items()):
        return "llama: found the sizes and the rope.freq_base of Mistral 7B v0.1"
    return None


# --- RoPE ----------------------------------------------------------------------------------------------------------


def _llama3_scaling(divisors_K: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling that divides frequencies so, in Hugging Face's terms; None if there is none.

    divisors_K [head_dim / 2]. The largest is the factor; the rest follows from those between it and 1.
    """
    factor = float(divisors_K.flat[-1])
    if divisors_K.shape != (head_dim // 2,) or not 1 <= factor < math.inf:
        return None
    wavelengths_K = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for low, high, length in (_LLAMA3, *_fitted(divisors_K.astype(np.float64), wavelengths_K)):
        smooth_K = np.clip((length / wavelengths_K - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth_K) / factor + smooth_K), divisors_K, rtol=2e-6, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    return None


def _fitted(divisors_K: np.ndarray, wavelengths_K: np.ndarray) -> list[tuple[float, float, int]]:
    """Whole low, high and length that fit divisors between 1 and the largest, up to a common factor: low is 1."""
    factor = divisors_K[-1]
    between_K = (divisors_K > 1) & (divisors_K < factor)
    frequencies = 1 / wavelengths_K[between_K]
    smooth = (1 / divisors_K[between_K] - 1 / factor) / (1 - 1 / factor)  # a line of the frequencies
    if len(frequencies) < 2 or frequencies[0] == frequencies[-1]:
        return []
    slope = (smooth[0] - smooth[-1]) / (frequencies[0] - frequencies[-1])
    offset = smooth[0] - slope * frequencies[0]
    if not -2 < offset < -1e-9:  # low would not be below high
        return []
    return [(1.0, float(round(1 - 1 / offset)), round(-slope / offset))]
