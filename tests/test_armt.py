"""Kind armt is the paper's ARMT, computed here token by token from its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import slow_llama as slow
from helpers import random_params

from lm2_jax.config import parse_config
from lm2_jax.model import build_model
from lm2_jax.model.memory.armt import features, recall, store
from lm2_jax.segments import run_segments

T, V, m, M = 6, 30, 3, 5
CONFIG = f"""
model: {{vocab_size: {V}, d_model: 16, num_layers: 2, num_heads: 4, num_kv_heads: 2, d_ff: 24}}
memory: {{kind: armt, num_slots: {m}, width: {M}}}
data: {{segment_length: {T}}}
"""


def made(noise=0.2):
    model = build_model(parse_config(CONFIG))
    return model, random_params(model, noise)


def phi(x):
    """DPFP-3, feature by feature: products of neighbours up to three apart in [relu(x), relu(-x)]; of length 1."""
    r = [max(value, 0) for value in (*x, *-x)]
    products = [r[i] * r[i - apart] for apart in (1, 2, 3) for i in range(len(r))]
    return np.array(products) / np.linalg.norm(products)


def recalled(A, z, key):
    return A @ key / (z @ key + 1e-5)


def read_document(model, params, segments):
    """Logits of every token of a document, and A and z of every layer after it."""
    c, all_logits = model.spec.model, []
    layers = list(slow.layers_of(params))
    state = [(np.zeros((c.d_model, 6 * M)), np.zeros(6 * M)) for _ in layers]
    for tokens in segments:
        embedded = np.asarray(params["embedding"], np.float64)[tokens]
        x = np.concatenate([embedded, np.asarray(params["memory_tokens"], np.float64)])
        position = [*range(len(tokens)), *[0] * m]
        for layer, p in enumerate(layers):
            (A, z), memory = state[layer], p["memory"]
            x = x + np.array([recalled(A, z, phi(one @ memory["query"])) for one in x])
            normed = slow.rms_norm(x, p["attention_norm"]["scale"], c.norm_eps)
            x = x + slow.attend(p["attention"], c, normed, position)
            x = x + slow.feed_forward(p["mlp"], slow.rms_norm(x, p["mlp_norm"]["scale"], c.norm_eps))
            A_new, z_new = A.copy(), z.copy()
            for token in x[-m:]:
                k, v = phi(token @ memory["key"]), token @ memory["value"]
                beta = slow.sigmoid(token @ memory["beta"][:, 0] + memory["beta_bias"][0])
                gamma = 1 - z @ k / np.linalg.norm(k) ** 2
                A_new += beta * np.outer(v - recalled(A, z, k), k)
                z_new += np.clip(gamma, 0, 1) * k
            state[layer] = A_new, z_new
        all_logits.append(slow.logits(params, c, x[:-m]))
    return np.concatenate(all_logits), state


def test_it_is_the_paper():
    """Four segments, the last one short; logits, A and z."""
    model, params = made()
    for memory, state in slow.assert_read_alike(model, params, (T, T, T, 4), read_document, atol=2e-4):
        for layer, (A, z) in enumerate(state):
            np.testing.assert_allclose(memory.matrix_BFD[layer, 0].T, A, atol=1e-4)
            np.testing.assert_allclose(memory.normaliser_BF[layer, 0], z, atol=1e-4)


def test_what_was_stored_is_recalled():
    """A key that is told something new recalls the new; |phi| = 1 and a known key adds nothing to z."""
    model, params = made()
    memory = {name: x[0] for name, x in params["bank_blocks"]["memory"].items()}
    memory["beta_bias"] = jnp.full(1, 40.0)  # beta is 1
    first_B1D = jax.random.normal(jax.random.key(2), (1, 1, 16))
    empty = jax.tree.map(lambda x: x[0], model.init_memory(1))
    once, _ = store(memory, first_B1D, empty)
    key_B1F = features(first_B1D @ memory["key"])
    found, known = recall(once, key_B1F, jnp.float32)
    np.testing.assert_allclose(found, first_B1D @ memory["value"], rtol=1e-4)
    np.testing.assert_allclose(known, 1, atol=1e-4)
    told_other = {**memory, "value": -2 * memory["value"]}
    twice, _ = store(told_other, first_B1D, once)
    np.testing.assert_allclose(recall(twice, key_B1F, jnp.float32)[0], -2 * first_B1D @ memory["value"], rtol=1e-3)
    np.testing.assert_allclose(twice.normaliser_BF, once.normaliser_BF, atol=1e-4)


def test_a_fresh_model_recalls_nothing():
    model = build_model(parse_config(CONFIG))
    params = jax.jit(model.init_params)(jax.random.key(0))
    tokens = np.arange(2 * T).reshape(1, 2, T) % V
    logits, memory = run_segments(model, params, tokens, model.init_memory(1))
    alone, _ = run_segments(model, params, tokens[:, 1:], model.init_memory(1))
    np.testing.assert_array_equal(logits[:, 1:], alone)
    assert not np.any(memory.matrix_BFD) and np.all(np.max(memory.normaliser_BF, axis=-1) > 0)
