"""A plain reference of a model with a window, in NumPy: one document, a dense mask, every distance by itself."""

import numpy as np
from bank_reference import read_banks
from slow_llama import feed_forward, layers_of, logits, rms_norm, softmax


def logits_of(config, params, tokens, cuts):
    """Logits of one document [t,V]; segments end before the tokens `cuts`. Head: the embedding table."""
    c, x = config.model, np.asarray(params["embedding"], np.float64)[tokens]
    for p in layers_of(params):
        normed = rms_norm(x, p["attention_norm"]["scale"], c.norm_eps)
        read = read_banks(config, p["memory"], normed, cuts) if "memory" in p else 0
        x = x + _attention(c, p["attention"], normed) + read
        x = x + feed_forward(p["mlp"], rms_norm(x, p["mlp_norm"]["scale"], c.norm_eps))
    return logits(params, c, x)


def visible(t, window, sinks):
    """Token to token, bool [t,t]."""
    query, key = np.ogrid[:t, :t]
    return (key <= query) & ((key > query - window) | (key < sinks))


def _attention(c, p, x):
    t, K = len(x), c.attention_head_dim
    q, k, v = ((x @ p[name]).reshape(t, -1, K) for name in ("query", "key", "value"))
    k, v = (np.repeat(a, c.num_heads // c.num_kv_heads, axis=1) for a in (k, v))
    distance = np.maximum(np.arange(t)[:, None] - np.arange(t), 0)
    if c.max_distance:
        distance = np.minimum(distance, c.max_distance)
    angle = distance[..., None, None] * c.rope_theta ** (-np.arange(0, K, 2) / K)
    first, second = np.split(q[:, None], 2, axis=-1)
    turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    scores = np.einsum("tshk,shk->hts", np.concatenate(turned, axis=-1), k) / K**0.5
    weights = softmax(np.where(visible(t, c.window, c.sinks), scores, -np.inf))
    return np.einsum("hts,shk->thk", weights, v).reshape(t, -1) @ p["output"]
