"""Attention whose tiles are chosen when the program runs: JAX's kernel, interpreted, equal to what is written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.model import chosen_tiles
from lm2_jax.model.memory import lm2

Q, K = 256, 64
near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def in_interpreter(kernel):
    return functools.partial(kernel, interpret=True)


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.array(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("sees", ["causal", "first half", "late queries"])
def test_kernel_equals_its_formula(sees):
    """With documents, and with queries that see no key: their part weighs nothing in the whole."""
    N, G, R = 1, 2, 2
    q, k, v, d_out = normal((N, G, R, Q, K), (N, G, Q, K), (N, G, Q, K), (N, G, R, Q, K))
    causal_Q = jnp.arange(Q)
    lasts = {
        "causal": causal_Q,
        "first half": jnp.full(Q, Q // 2 - 1),
        "late queries": jnp.where(causal_Q < Q // 2, -1, Q - 1),
    }
    document_NQ1 = jnp.sort(jnp.array(np.random.default_rng(0).integers(1, 4, (N, Q, 1))), axis=1)
    queries, keys = chosen_tiles.Queries(q / np.sqrt(K), document_NQ1), chosen_tiles.Keys(k, v, document_NQ1)
    rest = chosen_tiles.attend(queries, keys._replace(k_NGUK=k[:, :, ::-1]), causal_Q)

    part, of_kernel = (
        f(queries, keys, lasts[sees]) for f in (chosen_tiles.attend, in_interpreter(chosen_tiles.splash_part))
    )
    whole = chosen_tiles.join(rest, part)
    jax.tree.map(near, chosen_tiles.join(rest, of_kernel), whole)
    expected, found = (
        f(queries, keys, lasts[sees], whole, d_out)
        for f in (chosen_tiles.gradient, in_interpreter(chosen_tiles.splash_gradient))
    )
    jax.tree.map(near, found, expected)


def test_a_prefix_is_attended_to(monkeypatch):
    """The kernel and its own gradient, where documents are packed."""
    N, G, R = 1, 2, 2
    q, k, v, d_out = normal((N, G, R, Q, K), (N, G, 2 * Q, K), (N, G, 2 * Q, K), (N, G, R, Q, K))
    document_NU1 = jnp.sort(jnp.array(np.random.default_rng(0).integers(1, 4, (N, 2 * Q, 1))), axis=1)
    last_Q = jnp.arange(Q) + 100

    def results(q, k, v):
        queries = chosen_tiles.Queries(q / np.sqrt(K), document_NU1[:, last_Q])
        return chosen_tiles.attend_to_prefix(queries, chosen_tiles.Keys(k, v, document_NU1), last_Q)

    expected, pull = jax.vjp(results, q, k, v)
    expected = expected, pull(d_out)
    monkeypatch.setattr(chosen_tiles, "can_choose_tiles", lambda *sizes: True)
    monkeypatch.setattr(chosen_tiles, "_of_prefix", in_interpreter(chosen_tiles._of_prefix))
    found, pull = jax.vjp(results, q, k, v)
    jax.tree.map(near, (found, pull(d_out)), expected)


def test_one_of_two_banks_is_read(monkeypatch):
    """Rows that read the bank alone, the initial bank alone, and both, from within a tile and from its edge."""
    B, N, H = 4, 256, 2
    boundaries_B1 = np.array([[Q], [0], [100], [128]])
    q, *slots, d_out = normal((B, Q, H * K), (B, N, H * K), (B, N, H * K), (N, H * K), (N, H * K), (B, Q, H * K))
    reads_start_BT = jnp.arange(Q) >= boundaries_B1

    def results(q, *slots):
        out, pull = jax.vjp(lambda q, *s: lm2.attend_either(q, s[:2], s[2:], reads_start_BT, H), q, *slots)
        return out, pull(d_out)

    expected = results(q, *slots)
    monkeypatch.setattr(lm2, "can_choose_tiles", lambda *sizes: True)
    monkeypatch.setattr(lm2, "attend_to_either", in_interpreter(chosen_tiles.attend_to_either))
    monkeypatch.setattr(chosen_tiles, "tile_sizes", tiles_of_128)
    jax.tree.map(near, results(q, *slots), expected)


def tiles_of_128(queries, keys):
    return chosen_tiles.splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 128)
    )
