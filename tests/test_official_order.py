"""The official trainer's data order, against torch's own sampler."""

import numpy as np
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.data.lanes import make_iterator
from lm2_jax.data.official_order import torch_permutation
from lm2_jax.data.pipeline import Pipeline


@pytest.mark.parametrize("seed", [0, 1, 2**31])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000, 50_000])
def test_permutation_is_torchs(n, seed):
    torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
    assert torch_permutation(n, seed) == torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u4").tobytes())


def test_batches_are_the_official_trainers(tmp_path):
    """Two shards, two passes, against items sliced by hand in the order of torch's sampler."""
    torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
    B, T, rng = 2, 5, np.random.default_rng(0)
    shards = [rng.integers(0, 90, count) for count in (87, 71)]
    for number, tokens in enumerate(shards):
        write_shard(tmp_path / f"train_{number}.bin", tokens)
    settings = f"source: bin, path: [{tmp_path}/*.bin], order: official, boundaries: stream"
    config = parse_config(
        "",
        (
            "model.vocab_size=90",
            f"data={{{settings}, batch_size: {B}, segment_length: {T}, segments_per_window: 1}}",
        ),
    )
    windows = make_iterator(Pipeline(config, None).training(config.stages[0]), 0)
    for _ in range(2):
        for tokens in shards:
            items = range((len(tokens) - 1) // (B * T))
            sampler = torch.utils.data.DistributedSampler(items, num_replicas=1, rank=0, shuffle=True, seed=0)
            for item in sampler:
                window = next(windows)
                piece = tokens[item * B * T : (item + 1) * B * T + 1]
                np.testing.assert_array_equal(window.tokens_BST[:, 0], piece[:-1].reshape(B, T))
                np.testing.assert_array_equal(window.targets_BST[:, 0], piece[1:].reshape(B, T))
                assert not window.reset_BS.any()
                assert (window.document_BST == 1).all()


def test_a_shard_with_less_than_an_item(tmp_path):
    write_shard(tmp_path / "train.bin", range(10))
    settings = f"source: bin, path: {tmp_path}/train.bin, order: official, boundaries: stream"
    config = parse_config("", ("model.vocab_size=90", f"data={{{settings}, batch_size: 2, segment_length: 5}}"))
    with pytest.raises(UserError, match="10 tokens; an item of 2 x 5 needs 11"):
        Pipeline(config, None)


def test_only_for_a_stream_of_shards():
    with pytest.raises(UserError, match=r"data\.order official needs data\.source bin and data\.boundaries stream"):
        parse_config("", ("data.order=official",))
