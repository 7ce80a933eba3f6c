"""Segments whose tokens are spread over devices: equal to those on one device, forward and gradients."""

import functools

import jax
import numpy as np
import pytest
from helpers import random_params

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.model import build_model
from lm2_jax.model.context import balanced_order
from lm2_jax.parallel.mesh import batch_sharding, boxed_shardings, make_mesh, use_mesh
from lm2_jax.segments import run_batch
from lm2_jax.training.loss import loss_weights, window_loss

V, S, T = 64, 2, 32
SIZES = ("model={d_model: 32, d_ff: 48, num_layers: 2, num_heads: 4, num_kv_heads: 2}", "memory.kind=none")


def config_of(context, *more):
    window = f"data={{source: text, path: a, segment_length: {T}, segments_per_window: {S}, batch_size: 4}}"
    mesh = f"mesh={{data: -1, fsdp: {2 if context == 4 else 1}, context: {context}}}"
    rest = ("data.boundaries=packed", "tokenizer.kind=bytes", f"model.vocab_size={V}", mesh, *more)
    return parse_config("", (*SIZES, window, *rest))


def make_batch(lanes):
    """Packed documents, one of them longer than a device's tokens, and padding."""
    rng = np.random.default_rng(0)
    lengths = [(32,), (5, 20, 7), (1, 1, 28), (16, 16)]
    documents = [[n for n, length in enumerate(lengths[i % 4], 1) for _ in range(length)] for i in range(lanes * S)]
    document_BST = np.array([row + [0] * (T - len(row)) for row in documents], np.int32).reshape(lanes, S, T)
    tokens_BST, targets_BST = (rng.integers(1, V, (lanes, S, T)).astype(np.int32) for _ in range(2))
    return Batch(tokens_BST, document_BST, np.ones((lanes, S), bool), targets_BST, np.zeros((lanes, S, T), bool), True)


def results(model, params, batch):
    """Loss, gradients and hidden states."""

    def objective(params):
        outputs = run_batch(model, params, batch, model.init_memory(len(batch.tokens_BST)))
        weights_BST = loss_weights(batch, 1.0)
        return window_loss(model, params, outputs.hidden_BSTD, batch, weights_BST).loss, outputs.hidden_BSTD

    (loss, hidden), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    return {"loss": loss, "hidden": hidden, "gradients": gradients}


@functools.cache
def on_one_device(lanes, overrides):
    model = build_model(config_of(1, *overrides))
    params = random_params(model, 0.1)
    return params, jax.jit(functools.partial(results, model))(params, make_batch(lanes))


@pytest.mark.parametrize("how", ["gather", "ring"])
@pytest.mark.parametrize(
    ("context", "lanes", "overrides"),
    [
        (8, 1, ()),
        (4, 2, ("train.remat=full",)),
        (2, 4, ()),
        (8, 1, ("train.schedule=segment", "model.tie_embeddings=false")),
    ],
)
def test_equals_one_device(context, lanes, overrides, how):
    params, expected = on_one_device(lanes, overrides)
    config = config_of(context, f"mesh.context_keys={how}", *overrides)
    model = build_model(config)
    mesh = make_mesh(config)
    assert mesh.shape["context"] == context
    with use_mesh(mesh):
        params = jax.device_put(params, boxed_shardings(mesh, model.abstract_params(with_axes=True)))
        batch = jax.device_put(make_batch(lanes), batch_sharding(mesh))
        program = jax.jit(functools.partial(results, model)).lower(params, batch).compile()
        found = program(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    of_attention = [line for line in program.as_text().splitlines() if "shared_attention" in line]
    assert any(" collective-permute(" in line for line in of_attention) == (how == "ring")
    assert any(" all-gather(" in line for line in of_attention) == (how == "gather")


def test_order_gives_each_device_an_early_and_a_late_piece():
    np.testing.assert_array_equal(balanced_order(12, 3), [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("memory.kind=lm2", "mesh.context 8: memory.kind lm2 reads its memory in whole segments"),
        ("model.window=8", "mesh.context 8: model.window 8 attends to tokens nearby"),
        ("model.conv_width=4", "mesh.context 8: model.conv_width 4"),
        ("mesh.tensor=2", "mesh.context 8: found mesh.tensor 2"),
    ],
)
def test_refusals(setting, message):
    with pytest.raises(UserError, match=message):
        config_of(8, setting)


def test_segments_have_to_divide():
    with pytest.raises(UserError, match=r"mesh.context 8: the segment length 40 does not divide by 16"):
        make_mesh(config_of(8, "data.segment_length=40"))
