"""The router of lm2's writes (memory.write top_k): who may write, what stays, what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.model import build_model
from lm2_jax.model.memory.lm2 import route
from lm2_jax.segments import run_segments

B, T, N = 2, 6, 8
SIZES = "{vocab_size: 30, d_model: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, d_ff: 16}"


def made(*overrides):
    settings = (f"model={SIZES}", f"data.segment_length={T}", "memory={num_slots: 8, num_heads: 2, write_slots: 1}")
    model = build_model(parse_config("", (*settings, *overrides)))
    return model, jax.jit(model.init_params)(jax.random.key(0))


def test_k_slots_for_every_token():
    _, params = made("memory.write=top_k")
    p = {name: x[0] for name, x in params["bank_blocks"]["memory"].items()}
    x_BTD = jax.random.normal(jax.random.key(1), (B, T, 16))
    token_BT = jnp.ones((B, T), bool).at[1, 4:].set(False)
    for k in (1, 3):
        share_BNT = np.asarray(route(p, k, x_BTD, token_BT))
        np.testing.assert_array_equal((share_BNT > 0).sum(1), np.where(token_BT, k, 0))
        scores_BNT = np.swapaxes(1 / (1 + np.exp(-x_BTD @ p["router"])), 1, 2)
        best = np.sort(scores_BNT, axis=1)[:, -k:].sum(1)
        np.testing.assert_allclose(share_BNT.sum(1), np.where(token_BT, best, 0), rtol=1e-5)


def test_other_slots_keep_their_content_exactly():
    """Six tokens write at most six of eight slots; a dense write changes all."""
    tokens_BST = np.random.default_rng(0).integers(0, 30, (B, 3, T))
    for write, fewest in (("top_k", 2), ("dense", 0)):
        model, params = made(f"memory.write={write}")
        _, memory = run_segments(model, params, tokens_BST[:, :2], model.init_memory(B))
        _, after = run_segments(model, params, tokens_BST[:, 2:], memory)
        kept_BN = np.all(np.asarray(after == memory)[0], axis=-1)
        assert kept_BN.sum(1).min() >= fewest and kept_BN.sum(1).max() < N
        assert (write == "top_k") == kept_BN.any()


def test_the_router_learns():
    """From the next segment's loss; dense writes have none."""
    model, params = made("memory.write=top_k")
    tokens_BST = np.random.default_rng(0).integers(0, 30, (B, 2, T))

    def loss(params):
        return jnp.sum(jnp.sin(run_segments(model, params, tokens_BST, model.init_memory(B))[0][:, 1]))

    gradient = jax.jit(jax.grad(loss))(params)["bank_blocks"]["memory"]["router"]
    assert np.count_nonzero(np.abs(gradient).max(axis=1)) >= 2  # of layer, width and slot: the slots that were chosen
    assert "router" not in made()[1]["bank_blocks"]["memory"]


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("{write: top_k, write_slots: 17}", "memory.write_slots 17 is above memory.num_slots 16"),
        ("{write: top_k, kind: ntm}", "memory.write top_k: only kind lm2 has a router; use dense"),
    ],
)
def test_settings_that_cannot_be(memory, said):
    with pytest.raises(UserError, match=said):
        parse_config("", [f"memory={memory}"])
