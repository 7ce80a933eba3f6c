"""Decoding for many: a mesh of its own, and rows that come and go."""

import jax
import numpy as np
import pytest
from test_generate import CAUSAL, T, assert_close, make, teacher_forced, texts

from lm2_jax.common.errors import UserError
from lm2_jax.decoding import batching, placement, sampling
from lm2_jax.decoding.memory_file import save_state
from lm2_jax.model import attention
from lm2_jax.parallel.mesh import boxed_shardings, mesh_of_shape

EIGHT_HEADS = ("model.num_heads=8", "model.num_kv_heads=8", "memory.num_heads=8")


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize(
    ("overrides", "rows", "shape"),
    [(EIGHT_HEADS, 2, (1, 1, 1, 8)), ((), 4, (4, 1, 1, 2)), ((), 3, (4, 1, 1, 2))],
    ids=["along tensor", "rows and heads", "rows that do not divide"],
)
def test_decoding_over_eight_devices_is_teacher_forced(kind, overrides, rows, shape, monkeypatch):
    """Weights that lie on a 2 x 2 x 2 mesh of training are laid out for decoding, and give every logit.

    Prompts are read in windows that do not divide a segment, and attend to tiles of the cache.
    """
    monkeypatch.setattr(sampling, "WINDOW", 5)
    monkeypatch.setattr(attention, "_CACHE_TILE", 3)
    model, params = make(*overrides, kind=kind)
    prompts = [3, 8, 13, 5][:rows]
    whole = texts(*(n + T + 3 for n in prompts))
    expected = teacher_forced(model, params, whole)
    training = mesh_of_shape((2, 2, 1, 2))
    params = jax.device_put(params, boxed_shardings(training, model.abstract_params(with_axes=True)))
    params = placement.prepare(model, params)
    assert jax.tree.leaves(params)[0].sharding.mesh.devices.shape == shape

    start = sampling.start(model, params, rows)
    logits, state = sampling.read(model, params, [row[:n] for row, n in zip(whole, prompts, strict=True)], start)
    for step in range(T + 2):
        for row, n in enumerate(prompts):
            assert_close(logits[row], expected[row, n + step - 1])
        tokens_B1 = np.array([[row[n + step]] for row, n in zip(whole, prompts, strict=True)])
        logits, state = sampling.advance(model, params, tokens_B1, np.ones(rows), state)
        if step == 1:
            compiled = sampling.append._cache_size()
    assert sampling.append._cache_size() == compiled  # the layout of the state is the same after every token


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("temperature", [0, 1])
def test_rows_that_come_and_go_change_nothing(kind, temperature, monkeypatch):
    """Seven prompts through two rows: each continuation is the one it has alone, and nothing is compiled anew."""
    monkeypatch.setattr(sampling, "WINDOW", 3)  # prompts of several windows, which do not divide a segment
    model, params = make(kind=kind)
    prompts = texts(3, 21, 8, 1, 30, 5, 9)
    options = {"max_new_tokens": 12, "temperature": temperature, "stop_ids": (7, 11)}
    alone = [sampling.generate(model, params, [text], seed=i, **options)[0] for i, text in enumerate(prompts)]
    assert len({len(tokens) for tokens in alone}) > 1 or temperature == 0  # the likeliest may never be a stop
    found = dict(batching.decode_all(model, params, prompts[:3], 2, **options))
    compiled = sampling.append._cache_size()
    found = dict(batching.decode_all(model, params, prompts, 2, **options))
    assert sampling.append._cache_size() == compiled
    assert found == dict(enumerate(alone))


def test_a_memory_file_names_the_parameters_as_they_were_loaded(tmp_path):
    model, params = make()
    params = placement.prepare(model, params)
    with pytest.raises(ValueError, match="as they were loaded"):
        save_state(tmp_path / "m.safetensors", model, params, sampling.start(model, params, 1))


def test_all_prompts_are_looked_at_first():
    model, params = make()
    with pytest.raises(UserError, match="rows: found 0; give 1 or more"):
        next(batching.decode_all(model, params, [[1]], 0, max_new_tokens=3))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        next(batching.decode_all(model, params, [[1], []], 2, max_new_tokens=3))
    assert dict(batching.decode_all(model, params, [[1], [2]], 2, max_new_tokens=0)) == {0: [], 1: []}


@pytest.mark.parametrize("filled", [3, 40, 70])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tiles_of_the_cache_are_the_whole_cache(filled, kv_heads, monkeypatch):
    """Many queries, in tiles of which the last overlaps; padding and what lies beyond a row's end weigh nothing."""
    monkeypatch.setattr(attention, "_CACHE_TILE", 32)
    rng, (B, Q, H, K, C) = np.random.default_rng(0), (2, 3, 4, 8, 70)
    q_BQHK = rng.normal(size=(B, Q, H, K)).astype(np.float32)
    keys_BGCK, values_BGCK = rng.normal(size=(2, B, kv_heads, C, K)).astype(np.float32)
    index_BQ = np.array([[filled - 3, filled - 2, filled - 1], [0, C, C]])
    found_BQHK = attention.attention_to_cache(q_BQHK, keys_BGCK, values_BGCK, index_BQ)
    for b, q in ((0, 0), (0, 1), (0, 2), (1, 0)):
        seen = index_BQ[b, q] + 1
        for head in range(H):
            g = head // (H // kv_heads)
            scores = keys_BGCK[b, g, :seen] @ q_BQHK[b, q, head] / np.sqrt(K)
            weights = np.exp(scores - scores.max())
            expected = weights @ values_BGCK[b, g, :seen] / weights.sum()
            np.testing.assert_allclose(found_BQHK[b, q, head], expected, rtol=1e-5, atol=1e-5)
