"""The loss in vocabulary chunks, and its gradient, against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm2_jax.batch import Batch
from lm2_jax.config import Config, DataConfig, MemoryConfig, ModelConfig
from lm2_jax.model import build_model
from lm2_jax.parallel.mesh import make_mesh, use_mesh
from lm2_jax.training import loss
from lm2_jax.training.loss import loss_weights, window_loss

B, S, T, V = 8, 2, 6, 37


def example(tie):
    config = Config(
        model=ModelConfig(vocab_size=V, tie_embeddings=tie, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2),
        memory=MemoryConfig(kind="none"),
        data=DataConfig(batch_size=B),
    )
    rng = np.random.default_rng(1)
    model = build_model(config)
    params = model.init_params(jax.random.key(0))
    name = "embedding" if tie else "head"
    params = {**params, name: jnp.asarray(rng.normal(size=params[name].shape), jnp.float32)}
    hidden = jnp.asarray(rng.normal(size=(B, S, T, config.model.d_model)), jnp.float32)
    document = rng.integers(0, 2, (B, S, T)).astype(np.int32)
    batch = Batch(
        tokens_BST=None,
        targets_BST=jnp.asarray(rng.integers(0, V, (B, S, T)), jnp.int32),
        document_BST=jnp.asarray(document),
        reset_BS=None,
        answers_BST=jnp.asarray((rng.random((B, S, T)) < 0.3) & (document > 0)),
    )
    return config, model, params, hidden, batch, loss_weights(batch, 0.5), name


def whole(params, hidden, batch, weights, name):
    logits = hidden @ params[name].T
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets_BST)
    right = jnp.argmax(logits, axis=-1) == batch.targets_BST
    return jnp.sum(weights * nll), (jnp.sum(nll * (batch.document_BST > 0)), jnp.sum(right & batch.answers_BST))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("chunks", [1, 5, V])  # 37 = 5 · 8 - 3: the last rows of some chunks are padding
@pytest.mark.parametrize("devices", [1, 8])
def test_chunks_are_the_whole(monkeypatch, tie, chunks, devices):
    config, model, params, hidden, batch, weights, name = example(tie)
    monkeypatch.setattr(loss, "_MOST_LOGITS", -(-V * B * S * T // devices // chunks))

    def ours(params, hidden):
        sums = window_loss(model, params, hidden, batch, weights)
        return sums.loss, sums

    with use_mesh(make_mesh(config, jax.devices()[:devices])):
        (value, sums), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(params, hidden)
        alone = jax.jit(ours)(params, hidden)[1]  # without a gradient
    (expected, (nll, correct)), right = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(
        params, hidden, batch, weights, name
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-5)
    assert (int(sums.correct), int(sums.tokens), int(sums.answers)) == (
        int(correct),
        int(jnp.sum(batch.document_BST > 0)),
        int(jnp.sum(batch.answers_BST)),
    )
    assert int(correct) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums, alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradients, right)
