"""Kind delta is Gated DeltaNet, computed here token by token from the gated delta rule."""

import jax
import numpy as np
import pytest
import slow_llama as slow
from helpers import random_params

from lm2_jax.config import parse_config
from lm2_jax.model import build_model
from lm2_jax.model.memory.delta import gated_delta_rule

T, V, H, M = 40, 30, 2, 12
CONFIG = f"""
model: {{vocab_size: {V}, d_model: 16, num_layers: 2, num_heads: 4, num_kv_heads: 2, d_ff: 24}}
memory: {{kind: delta, num_heads: {H}, width: {M}}}
data: {{segment_length: {T}}}
"""


def by_equation(q, k, v, alpha, beta, starts, S):
    """o_t of one head, and S after the last token; arrays [X,K], [X,V] and [X], and S [V,K]."""
    out = []
    for t in range(len(q)):
        if starts[t]:
            S = np.zeros_like(S)
        S = S @ (alpha[t] * (np.eye(k.shape[1]) - beta[t] * np.outer(k[t], k[t]))) + beta[t] * np.outer(v[t], k[t])
        out.append(S @ q[t])
    return np.array(out), S


@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_chunks_are_the_equation(length):
    """Of several lanes and heads; with documents that start anywhere, and tokens that change nothing."""
    rng, B, K, width = np.random.default_rng(length), 2, 6, 5
    q, k = rng.normal(size=(2, B, length, H, K))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, S = rng.normal(size=(B, length, H, width)), rng.normal(size=(B, H, K, width))
    idle = rng.random((B, length, 1)) < 0.2
    alpha = np.where(idle, 1, rng.uniform(0.3, 1, (B, length, H)))
    beta = np.where(idle, 0, rng.uniform(0, 1, (B, length, H)))
    starts = rng.random((B, length)) < np.array([0.0, 0.1])[:, None]
    arrays = (x.astype(np.float32) for x in (q, k, v, np.log(alpha), beta))
    out, after = jax.jit(gated_delta_rule)(*arrays, starts, S.astype(np.float32))
    for lane in range(B):
        for h in range(H):
            of_head = (x[lane, :, h] for x in (q, k, v, alpha, beta))
            expected, S_after = by_equation(*of_head, starts[lane], S[lane, h].T)
            np.testing.assert_allclose(out[lane, :, h], expected, atol=1e-5)
            np.testing.assert_allclose(after[lane, h].T, S_after, atol=1e-5)


def read_document(model, params, segments):
    """Logits of every token of a document, and S [H,V,K] of every layer after it."""
    c, all_logits = model.spec.model, []
    layers = list(slow.layers_of(params))
    state = [np.zeros((H, c.d_model // H, M // H)) for _ in layers]
    for tokens in segments:
        x = np.asarray(params["embedding"], np.float64)[tokens]
        for layer, p in enumerate(layers):
            normed, memory = slow.rms_norm(x, p["attention_norm"]["scale"], c.norm_eps), p["memory"]
            q, k, v = (slow.silu(normed @ memory[n]).reshape(len(x), H, -1) for n in ("query", "key", "value"))
            q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
            beta = slow.sigmoid(normed @ memory["beta"])
            alpha = np.exp(
                -np.exp(memory["decay_rate_bias"]) * np.log1p(np.exp(normed @ memory["decay"] + memory["decay_bias"]))
            )
            out, never = np.zeros_like(v), np.zeros(len(x), bool)
            for h in range(H):
                of_head = (a[:, h] for a in (q, k, v, alpha, beta))
                out[:, h], state[layer][h] = by_equation(*of_head, never, state[layer][h])
            out = slow.rms_norm(out, memory["output_norm"], c.norm_eps).reshape(len(x), -1)
            added = (out * slow.silu(normed @ memory["gate"])) @ memory["output"]
            x = x + slow.attend(p["attention"], c, normed, range(len(x))) + added
            x = x + slow.feed_forward(p["mlp"], slow.rms_norm(x, p["mlp_norm"]["scale"], c.norm_eps))
        all_logits.append(slow.logits(params, c, x))
    return np.concatenate(all_logits), state


def test_it_is_the_paper():
    """Four segments, of which the last is short, in chunks that segments do not divide; logits and S."""
    model = build_model(parse_config(CONFIG))
    params = random_params(model, 0.2)
    for memory, state in slow.assert_read_alike(model, params, (T, T, T, T - 7), read_document, atol=5e-4):
        np.testing.assert_allclose(np.swapaxes(memory[:, 0], -1, -2), state, atol=1e-4)


def test_heads_forget_at_different_rates_at_first():
    model = build_model(parse_config(CONFIG, ["memory.num_heads=4"]))
    bias = jax.jit(model.init_params)(jax.random.key(0))["bank_blocks"]["memory"]["decay_bias"]
    np.testing.assert_allclose(1 / np.log1p(np.exp(bias)), [np.geomspace(10, 1000, 4)] * 2, rtol=1e-3)
