"""The TPU's kernel, interpreted on the CPU, against plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from lm2_jax.model import attention as module
from lm2_jax.model.attention import Sinks, attention, attention_weights, window_attention

B, T, U, K = 2, 256, 128, 64


def arrays(H, G, keys):
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, keys, G, K), (B, keys, G, K))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.fixture
def on_tpu(monkeypatch):
    """Chooses the kernel, and interprets it."""
    make = functools.partial(splash.make_splash_mqa_single_device, interpret=True)

    def choose(yes):
        monkeypatch.setattr(module, "on_tpu", lambda: yes)
        monkeypatch.setattr(splash, "make_splash_mqa_single_device", make)

    return choose


CASES = pytest.mark.parametrize("shape", [(True, 4, 2, T), (False, 2, 2, U), (False, 2, 2, T)])


def out_and_gradients(shape, grouped):
    """shape: (causal, H, G, number of keys)."""
    causal, H, G, keys = shape
    q, k, v = arrays(H, G, keys)
    groups = {}
    if grouped:  # of the keys, a part is seen; causal: as in packed documents
        of_keys = (jnp.arange(keys)[None] + jnp.array([[0], [40]])) // 100
        of_queries = of_keys if causal else jnp.ones((B, T), jnp.int32)
        groups = {"q_document_ids_BT": of_queries, "kv_document_ids_BU": of_keys}
    weights = jnp.cos(jnp.arange(K))

    def run(q, k, v):
        out = attention(q, k, v, causal=causal, **groups)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@CASES
@pytest.mark.parametrize("grouped", [True, False])
def test_the_kernel_is_plain_attention(on_tpu, shape, grouped):
    results = []
    for yes in (False, True):
        on_tpu(yes)
        results.append(out_and_gradients(shape, grouped))
    for plain, kernel in zip(*results, strict=True):
        np.testing.assert_allclose(kernel, plain, atol=2e-4)


@CASES
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("tile", "most"), [(96, 8), (16, 3)], ids=["the last is shorter", "few long ones"])
def test_tiles_are_plain_attention(monkeypatch, shape, grouped, tile, most):
    monkeypatch.setattr(module, "_CPU_TILE", T)
    plain = out_and_gradients(shape, grouped)
    monkeypatch.setattr(module, "_CPU_TILE", tile)
    monkeypatch.setattr(module, "_MOST_CPU_TILES", most)
    for array, expected in zip(out_and_gradients(shape, grouped), plain, strict=True):
        np.testing.assert_allclose(array, expected, atol=2e-5)


def test_tiles_hold_fewer_weights_at_a_time(monkeypatch):
    """Forward and backward on a CPU, of a long segment."""
    q = jax.ShapeDtypeStruct((1, 2048, 2, K), jnp.float32)

    def bytes_needed():
        gradient = jax.grad(lambda q: jnp.sum(attention(q, q, q, causal=True) ** 2))
        return jax.jit(gradient).lower(q).compile().memory_analysis().temp_size_in_bytes

    in_tiles = bytes_needed()
    monkeypatch.setattr(module, "_CPU_TILE", 2048)
    assert in_tiles < 0.6 * bytes_needed()


@pytest.mark.parametrize("with_sinks", [False, True], ids=["near", "sinks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_has_a_window(on_tpu, dtype, with_sinks):
    """Row 0: one document; row 1: a document that ends and one that has sinks of its own."""
    window, H, G, J = 100, 4, 2, 3
    q, k, v = (x.astype(dtype) for x in arrays(H, G, window - 1 + T))
    begins = jnp.array([[T], [50]])
    of_queries = 1 + (jnp.arange(T) >= begins)
    of_keys = jnp.concatenate([jnp.ones((B, window - 1), jnp.int32), of_queries], axis=1)
    rng = np.random.default_rng(1)
    ids = jnp.array([[1, 1, -1], [1, 2, 2]])
    seen = (of_queries[..., None] == ids[:, None]) & jnp.array(rng.random((B, T, J)) < 0.6)
    scores, values = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((B, H, T, J), (B, J, G, K)))

    def run(q, k, v, scores, values):
        sinks = Sinks(9 * scores, seen, ids, values.astype(dtype)) if with_sinks else None
        out = window_attention(q, k, v, window, of_queries, of_keys, sinks)
        return jnp.sum(out * jnp.cos(jnp.arange(K))), out

    results = []
    for yes in (False, True):
        on_tpu(yes)
        (_, out), grads = jax.value_and_grad(run, argnums=range(5), has_aux=True)(q, k, v, scores, values)
        results.append((out, *grads))
    for plain, kernel in zip(*results, strict=True):
        plain, kernel = (np.asarray(x, np.float32) for x in (plain, kernel))
        tolerance = 2e-4 if dtype == "float32" else 0.03 * np.abs(plain).max()
        np.testing.assert_allclose(kernel, plain, atol=tolerance)


@pytest.mark.parametrize(("queries", "keys", "width"), [(96, 128, 64), (128, 24, 64), (128, 128, 24)])
def test_what_has_no_tiles_is_computed_plainly(on_tpu, queries, keys, width):
    on_tpu(True)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, length, 1, width)).astype(np.float32) for length in (queries, keys, keys))
    scores = np.einsum("bthk,buhk->bhtu", q, k) / np.sqrt(width)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhtu,buhk->bthk", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(attention(*map(jnp.array, (q, k, v))), expected, atol=1e-5)


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2)])
def test_shares_are_what_attention_mixes_by(H, G):
    """Of keys whose values are one-hot, attention gives the shares themselves."""
    q_BTHK, k_BUGK, _ = arrays(H, G, K)
    one_hot_BUGU = jnp.broadcast_to(jnp.eye(K)[:, None], (B, K, G, K))
    seen_BU = jnp.arange(K) < jnp.array([[K], [10]])
    groups = {"q_document_ids_BT": jnp.ones((B, T), jnp.int32), "kv_document_ids_BU": seen_BU.astype(jnp.int32)}
    mixed_BTHU = attention(q_BTHK, k_BUGK, one_hot_BUGU, **groups)
    shares_BTU = attention_weights(q_BTHK, k_BUGK, seen_BU[:, None])
    np.testing.assert_allclose(shares_BTU, mixed_BTHU.mean(2), atol=1e-5)
