"""Meshes along data, fsdp and tensor at once, where XLA's partitioner is seen to exchange rows of a plain product.

How many tokens a device has decides whether it does (findings/xla-partitioner-exchanges-rows.sh).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

from lm2_jax.config import parse_config
from lm2_jax.model import build_model
from lm2_jax.parallel.mesh import batch_sharding, boxed_shardings, mesh_of_shape, use_mesh
from lm2_jax.segments import run_segments

V, ROWS = 64, 4  # one row for every device along data and fsdp
SIZES = {1: (1, 1), 8: (2, 4), 64: (4, 16)}  # tokens a device: segments and their length


@functools.cache
def case(kind, tokens, overrides):
    S, T = (2, 32) if kind == "official" else SIZES[tokens]  # official: as many slots, and so wide, as a segment
    slots = T if kind == "official" else 6
    sizes = (
        "model.d_model=32",
        "model.d_ff=48",
        "model.num_layers=2",
        f"memory.num_slots={slots}",
        f"data.segment_length={T}",
    )
    model = build_model(parse_config("", (f"model.vocab_size={V}", f"memory.kind={kind}", *sizes, *overrides)))
    rng = np.random.default_rng(tokens)
    return model, random_params(model, 0.1), rng.integers(0, V, (ROWS, S, T)), rng.normal(size=(ROWS, S, T, V))


def results(model, params, tokens_BST, weights_BSTV, schedule):
    """Logits, memory, and gradients of a weighted sum of logits."""

    def objective(params):
        memory = model.init_memory(ROWS, params)
        logits_BSTV, memory = run_segments(model, params, tokens_BST, memory, schedule=schedule)
        return jnp.sum(logits_BSTV * weights_BSTV), (logits_BSTV, memory)

    gradients, (logits_BSTV, memory) = jax.grad(objective, has_aux=True)(params)
    return {"gradients": gradients, "logits": logits_BSTV, "memory": memory}


VARIANTS = {
    "segment by segment": ((), "segment"),
    "window": (("model.window=4", "model.sinks=1"), "layer"),
    "router": (("memory.write=top_k", "memory.write_slots=2"), "layer"),
    "lora": (("model.lora={rank: 4, targets: [attention, mlp, embedding]}",), "layer"),
    "remat": (("train.remat=full",), "layer"),
}


def cases():
    """(kind, tokens a device, overrides, schedule); without --runslow, what test_step.py does not train on eight."""
    for kind in ("lm2", "none", "rmt", "armt", "delta", "ntm"):
        for tokens in SIZES:
            quick = (kind, tokens) in (("lm2", 1), ("armt", 8), ("delta", 8), ("ntm", 8))
            marks = () if quick else pytest.mark.slow
            yield pytest.param(kind, tokens, (), "auto", marks=marks, id=f"{kind}, {tokens}")
    yield pytest.param("official", 64, (), "auto", marks=pytest.mark.slow, id="official, 64")
    for name, (overrides, schedule) in VARIANTS.items():
        for tokens in (8, 64) if name == "window" else SIZES:
            yield pytest.param("lm2", tokens, overrides, schedule, marks=pytest.mark.slow, id=f"{name}, {tokens}")


@pytest.mark.parametrize(("kind", "tokens", "overrides", "schedule"), list(cases()))
def test_three_axes_are_one_device(kind, tokens, overrides, schedule):
    """Logits, memory and gradients of a 2 x 2 x 2 mesh, with 1, 8 and 64 tokens a device."""
    model, params, tokens_BST, weights_BSTV = case(kind, tokens, overrides)
    run = jax.jit(functools.partial(results, model, schedule=schedule))
    expected = run(params, tokens_BST, weights_BSTV)
    mesh = mesh_of_shape((2, 2, 1, 2))
    placed = jax.device_put(params, boxed_shardings(mesh, model.abstract_params(with_axes=True)))
    with use_mesh(mesh):
        found = run(placed, *jax.device_put((tokens_BST, weights_BSTV), batch_sharding(mesh)))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(np.abs(b).max(), 0.1)  # a bias of keys has no gradient but rounding
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-5, err_msg=jax.tree_util.keystr(path))
