"""A Llama read position by position in float64 NumPy, from its equations: the ground of the memory kinds' references.

Axes: X positions of one segment, D model width, H heads, G kv heads, K head width.
"""

import jax
import numpy as np

from lm2_jax.segments import run_segments


def layers_of(params):
    """The blocks' parameters in order, in float64; their banks are in `memory`."""
    stacks = [params[name] for name in ("first_blocks", "bank_blocks", "blocks") if name in params]
    for stack in stacks:
        for row in range(len(stack["mlp"]["gate"])):
            yield jax.tree.map(lambda x, row=row: np.asarray(x[row], np.float64), stack)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def attend(p, c, x_XD, position_X):
    """Causal self-attention of one document, query by query."""
    K, groups = c.attention_head_dim, c.num_heads // c.num_kv_heads
    q_XHK, k_XGK, v_XGK = ((x_XD @ p[name]).reshape(len(x_XD), -1, K) for name in ("query", "key", "value"))
    q_XHK, k_XGK = (_rotated(x, position_X, c.rope_theta) for x in (q_XHK, k_XGK))
    out_XHK = np.zeros_like(q_XHK)
    for t in range(len(x_XD)):
        for h in range(c.num_heads):
            scores = k_XGK[: t + 1, h // groups] @ q_XHK[t, h] / np.sqrt(K)
            out_XHK[t, h] = softmax(scores) @ v_XGK[: t + 1, h // groups]
    return out_XHK.reshape(len(x_XD), -1) @ p["output"]


def feed_forward(p, x):
    return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def logits(params, c, x_XD):
    """Of a model with tied embeddings."""
    hidden = rms_norm(x_XD, np.asarray(params["final_norm"]["scale"], np.float64), c.norm_eps)
    return hidden @ np.asarray(params["embedding"], np.float64).T


def assert_read_alike(model, params, lengths, read_document, atol):
    """Logits of a document in segments of these lengths are those of `read_document`, in both schedules.

    Yields the memory after the document in either, beside the state after it that `read_document` returns.
    """
    T, rng = model.spec.segment_length, np.random.default_rng(0)
    segments = [rng.integers(0, model.spec.model.vocab_size, length) for length in lengths]
    expected, state = read_document(model, params, segments)
    tokens_ST, document_ST = np.zeros((2, len(lengths), T), np.int32)
    for s, tokens in enumerate(segments):
        tokens_ST[s, : len(tokens)], document_ST[s, : len(tokens)] = tokens, 1
    for schedule in ("segment", "layer"):
        logits, memory = run_segments(
            model, params, tokens_ST[None], model.init_memory(1), document_BST=document_ST[None], schedule=schedule
        )
        np.testing.assert_allclose(logits[0][document_ST > 0], expected, atol=atol)
        yield memory, state


def _rotated(x_XHK, position_X, theta):
    half = x_XHK.shape[-1] // 2
    turned = x_XHK.copy()
    for i in range(half):
        angle = np.asarray(position_X, np.float64)[:, None] * theta ** (-i / half)
        first, second = x_XHK[..., i], x_XHK[..., i + half]
        turned[..., i] = first * np.cos(angle) - second * np.sin(angle)
        turned[..., i + half] = second * np.cos(angle) + first * np.sin(angle)
    return turned
