"""RoPE tables in state dicts of Llama-2 times: left out if they say what the config says, refused otherwise."""

import ml_dtypes
import numpy as np
import pytest
from convert_helpers import convert, random_llama
from safetensors.numpy import load_file, save_file

from lm2_jax.common.errors import UserError

NAMES = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
K = 8  # width of a head


def _with_tables(path, name, table_K, dtype):
    random_llama(path, name)
    tensors = load_file(path / "model.safetensors")
    tables = {key: table_K.astype(dtype) for key in NAMES}
    save_file(tensors | tables, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _plain_table(theta=1e4):
    return theta ** (-np.arange(0, K, 2) / K)


def _llama3_table():
    """Llama 3's scaling by 8 beyond a context of 64, written out for theta 5e5: kept, blended and slowed down."""
    plain_K = _plain_table(5e5)
    length_K = 2 * np.pi / plain_K
    smooth_K = (64 / length_K - 1) / (4 - 1)
    blended_K = (1 - smooth_K) * plain_K / 8 + smooth_K * plain_K
    return np.where(length_K < 64 / 4, plain_K, np.where(length_K > 64, plain_K / 8, blended_K))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("name", "table_K"),
    [("tied, grouped", _plain_table()), ("untied, llama3 scaling", _llama3_table())],
    ids=["plain", "llama3"],
)
def test_tables_that_follow_from_the_config(tmp_path, name, table_K, dtype):
    llama = _with_tables(tmp_path / "llama", name, table_K, dtype)
    convert("huggingface", "lm2_jax", llama, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "params.safetensors")
    assert "embedding" in tensors
    assert not [name for name in tensors if "rotary" in name]


@pytest.mark.parametrize(
    ("name", "table_K", "dtype"),
    [
        ("tied, grouped", _plain_table(2e4), np.float16),  # another theta
        ("tied, grouped", _plain_table() / 2, np.float32),  # linear scaling
        ("tied, grouped", _plain_table()[:-1], np.float32),  # of narrower heads
        ("tied, grouped", _plain_table(), np.int32),
        ("untied, llama3 scaling", _plain_table(5e5), np.float32),  # without the scaling
    ],
)
def test_tables_that_contradict_the_config(tmp_path, name, table_K, dtype):
    llama = _with_tables(tmp_path / "llama", name, table_K, dtype)
    with pytest.raises(
        UserError, match=f"other RoPE frequencies than .* in {NAMES[0]}, {NAMES[1]}; mend the config, or remove them"
    ):
        convert("huggingface", "lm2_jax", llama, tmp_path / "ours")


def test_other_names_stay_unknown(tmp_path):
    llama = _with_tables(tmp_path / "llama", "tied, grouped", _plain_table(), np.float32)
    tensors = load_file(llama / "model.safetensors")
    save_file(tensors | {"model.layers.0.inv_freq": tensors[NAMES[0]]}, llama / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.0\.inv_freq: is not a tensor of this model"):
        convert("huggingface", "lm2_jax", llama, tmp_path / "ours")
