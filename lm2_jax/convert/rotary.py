"""Tables of RoPE frequencies in state dicts of old versions of transformers and of the official code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.config import ModelConfig
from lm2_jax.convert.tensors import Tensor
from lm2_jax.model.layers import rope_frequencies

_TABLE = re.compile(r"model\.(layers\.\d+\.(mem_attn\.)?self_attn\.)?rotary_emb\.inv_freq")
_ROUNDING = 1e-5  # relative, of float32 powers in other programs


def without_rope_tables(tensors: Mapping[str, Tensor], model: ModelConfig, where: Path) -> dict[str, Tensor]:
    """The tensors but tables of frequencies, which follow from the config.

    Raises UserError for tables that say something else than the config, beyond the rounding of their dtype.
    """
    expected_K = np.asarray(rope_frequencies(model.attention_head_dim, model.rope_theta, model.rope_scaling))
    tables = {name: tensor for name, tensor in tensors.items() if _TABLE.fullmatch(name)}
    differing = [name for name, tensor in tables.items() if not _says(tensor, expected_K)]
    if differing:
        scaling = "no scaling" if model.rope_scaling is None else repr(model.rope_scaling)
        raise UserError(
            f"{where}: other RoPE frequencies than the config's (rope_theta {model.rope_theta:g}, {scaling}, heads of "
            f"width {model.attention_head_dim}) in {', '.join(differing)}; mend the config, or remove them"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in tables}


def _says(tensor: Tensor, expected_K: np.ndarray) -> bool:
    if tensor.shape != expected_K.shape or not tensor.is_float:
        return False
    found_K = tensor.read()
    kind = ml_dtypes.finfo(found_K.dtype)
    rounding = max(float(kind.eps), _ROUNDING)
    return np.allclose(found_K.astype(np.float32), expected_K, rtol=rounding, atol=float(kind.smallest_subnormal))
