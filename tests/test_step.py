"""The train step: many devices are one device, microbatches are one batch, the loss counts what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from lm2_jax.batch import Batch
from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.decoding import sampling
from lm2_jax.model import build_model
from lm2_jax.model.lora import is_addition
from lm2_jax.parallel.fsdp import MESH_AXES
from lm2_jax.parallel.mesh import RULES, make_mesh, use_mesh
from lm2_jax.segments import run_segments
from lm2_jax.training.loss import loss_weights
from lm2_jax.training.optim import decay_mask, learning_rate, make_optimizer
from lm2_jax.training.state import StepConfig, create_state
from lm2_jax.training.step import make_eval_step, make_train_step

V, B, S, T = 64, 8, 3, 8
EDGES = ("model.window=6", "model.sinks=2", "model.max_distance=9")
LOW_RANK = (
    "optim.train=[memory, lora]",
    "optim.lm_loss_weight=0",
    "memory.first_layer=1",
    "model.lora={rank: 4, targets: [attention, mlp, embedding]}",
)


def config_of(*overrides):
    base = ("model.d_model=32", "model.d_ff=48", "model.num_layers=2", "memory.num_slots=6", "optim.warmup_steps=2")
    base += ("optim.eps=1e-3",)  # Adam must not blow rounding noise up to whole steps
    return parse_config("", (f"model.vocab_size={V}", f"data.batch_size={B}", "train.steps=20", *base, *overrides))


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    for number in range(count):
        tokens = rng.integers(0, V, (B, S, T), dtype=np.int32)
        document = np.ones((B, S, T), np.int32)
        document[0, 1, 4:] = 0
        yield Batch(
            tokens_BST=tokens,
            targets_BST=np.roll(tokens, -1, axis=-1),
            document_BST=document,
            reset_BS=rng.random((B, S)) < (1 if number == 0 else 0.3),
            answers_BST=(rng.random((B, S, T)) < 0.1) & (document > 0),
        )


@functools.cache
def trained(devices, *overrides, steps=4):
    """(state on the host, metrics, state) after some steps."""
    config, devices = config_of(*overrides), jax.devices()[:devices]
    run = build_model(config), make_mesh(config, devices), StepConfig.of(config)
    with use_mesh(run[1]):
        state, train_step = create_state(*run), make_train_step(*run)
        metrics = []
        for batch in batches(steps):
            state, here = train_step(state, batch)
            metrics.append(jax.device_get(here))
        return jax.device_get(state), metrics, state


def assert_same_run(one, other, tolerance=2e-4):
    for a, b in zip(one[1], other[1], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=tolerance, err_msg=name)
    for a, b in zip(jax.tree.leaves(one[0].memory), jax.tree.leaves(other[0].memory), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "remat", "schedule", "optimizer"),
    [("lm2", "none", "layer", "adamw"), ("lm2", "full", "layer", "adamw"), ("lm2", "none", "segment", "adamw"),
     ("rmt", "none", "segment", "adamw"), ("none", "none", "layer", "muon"),
     *(pytest.param(kind, "none", "layer", "adamw", marks=pytest.mark.slow) for kind in ("armt", "delta", "ntm"))],
)  # fmt: skip
def test_eight_devices_are_one(kind, remat, schedule, optimizer):
    """data 2 x fsdp 2 x tensor 2, same data order, to float noise."""
    run = (f"memory.kind={kind}", f"train.remat={remat}", f"train.schedule={schedule}", f"optim.kind={optimizer}")
    one = trained(1, *run)
    eight = trained(8, *run, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert_same_run(one, eight)
    # and the work is really spread
    query = eight[2].params["blocks" if kind in ("rmt", "none") else "bank_blocks"]["attention"]["query"]
    assert query.sharding.shard_shape(query.shape) == (query.shape[0], query.shape[1] // 2, query.shape[2] // 2)
    for leaf in jax.tree.leaves(eight[2].memory):
        assert leaf.sharding.shard_shape(leaf.shape)[0 if kind == "rmt" else 1] == B // 4


@pytest.mark.parametrize(
    ("kind", "schedule"), [("lm2", "layer"), pytest.param("none", "segment", marks=pytest.mark.slow)]
)
def test_edges_on_eight_devices(kind, schedule):
    run = (f"memory.kind={kind}", f"train.schedule={schedule}", *EDGES)
    one = trained(1, *run)
    eight = trained(8, *run, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert_same_run(one, eight)
    for leaf in jax.tree.leaves(eight[2].memory.edges):
        assert leaf.sharding.shard_shape(leaf.shape)[1] == B // 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [("memory.kind=lm2", "train.schedule=layer", *EDGES), LOW_RANK], ids=["edges", "low-rank additions"]
)
def test_edges_and_additions_in_microbatches(run):
    assert_same_run(trained(1, *run), trained(1, *run, "optim.accumulation_steps=4"))


def test_low_rank_additions_on_eight_devices():
    """Beside a frozen base, with the answers alone in the loss."""
    one = trained(1, *LOW_RANK)
    eight = trained(8, *LOW_RANK, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert_same_run(one, eight)
    for name, leaf in flatten_dict(eight[2].frozen, sep="/").items():
        np.testing.assert_array_equal(leaf, flatten_dict(one[2].frozen, sep="/")[name], err_msg=name)
    for name, leaf in flatten_dict(one[2].params, sep="/").items():
        assert is_addition(name) or "/memory/" in name
        assert not name.endswith("_lora_b") or np.ptp(leaf) > 0, name


def test_constraints_reach_the_compiler():
    """Logical constraints vanish silently without a mesh; they must be in the lowered text."""
    config = config_of("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    run = build_model(config), make_mesh(config), StepConfig.of(config)
    with use_mesh(run[1]):
        lowered = make_train_step(*run).lower(create_state(*run), next(batches(1))).as_text()
    assert "sharding_constraint" in lowered
    assert '{"data", "fsdp"}' in lowered


@pytest.mark.parametrize("devices", [1, 8])
def test_weights_are_gathered_where_they_are_sharded(devices):
    config = config_of()
    run = build_model(config), make_mesh(config, jax.devices()[:devices]), StepConfig.of(config)
    with use_mesh(run[1]):
        lowered = make_train_step(*run).lower(create_state(*run), next(batches(1))).as_text()
    assert ("all_gather" in lowered, "reduce_scatter" in lowered) == (devices > 1, devices > 1)


@pytest.mark.parametrize(("kind", "schedule"), [("lm2", "layer"), ("rmt", "segment")])
def test_microbatches_are_one_batch(kind, schedule):
    run = (f"memory.kind={kind}", "train.remat=none", f"train.schedule={schedule}", "optim.kind=adamw")
    assert_same_run(trained(1, *run), trained(1, *run, "optim.accumulation_steps=4"))


def test_loss_is_the_mean_over_what_counts():
    """answers' mean + weight · mean over all tokens, recomputed from logits."""
    overrides = ("optim.lm_loss_weight=0.25", "optim.learning_rate=1e-9")
    _, metrics, state = trained(1, *overrides, steps=1)
    model, batch = build_model(config_of(*overrides)), next(batches(1))
    rest = {name: getattr(batch, name) for name in ("reset_BS", "document_BST")}
    run = jax.jit(lambda params, memory: run_segments(model, params, batch.tokens_BST, memory, **rest))
    logits, _ = run(state.params, model.init_memory(B))
    nll = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets_BST))
    answers, tokens = batch.answers_BST, batch.document_BST > 0
    expected = nll[answers].mean() + 0.25 * nll[tokens].mean()
    np.testing.assert_allclose(metrics[0]["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["nll"], nll[tokens].mean(), rtol=1e-5)
    assert metrics[0]["tokens_in_step"] == tokens.sum()
    correct = (np.argmax(logits, -1) == batch.targets_BST) & answers
    assert metrics[0]["correct_in_step"] == correct.sum()
    weights = loss_weights(dataclasses.replace(batch, answers_BST=np.zeros_like(answers)), 1.0)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


def test_validation_leaves_training_alone():
    config = config_of()
    run = build_model(config), make_mesh(config, jax.devices()[:1]), StepConfig.of(config)
    with use_mesh(run[1]):
        state = create_state(*run)
        before = jax.device_get(state)
        sums, memory = make_eval_step(*run)(state.params, run[0].init_memory(B), next(batches(1)))
        assert int(sums.tokens) > 0 and np.any(np.asarray(memory) != before.memory)
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


@pytest.mark.parametrize("kind", ["lm2", "rmt", "armt", "delta", "ntm", "none"])
def test_decay_mask(kind):
    params = build_model(config_of(f"memory.kind={kind}", "model.conv_width=4")).abstract_params()
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        name = path[-1].key
        undecayed = name in ("embedding", "scale", "memory_tokens") or name.endswith(("_bias", "_norm", "_norm_2"))
        assert decays != undecayed, path


def test_muon():
    """Attention and feed-forward layers step by orthogonal matrices as large as Adam's steps; the rest is Adam's."""
    model = build_model(config_of("model.conv_width=4", "optim.kind=muon"))
    params = model.init_params(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    grads = tree.unflatten([jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])

    def directions(kind):
        optimizer = make_optimizer(config_of(f"optim.kind={kind}", "optim.weight_decay=0").optim)
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]

    orthogonal = 0
    for (path, muon), adam in zip(
        jax.tree_util.tree_leaves_with_path(directions("muon")), jax.tree.leaves(directions("adamw")), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "['attention']" in name or "['mlp']" in name:
            orthogonal += 1
            singular = np.linalg.svd(muon, compute_uv=False) / (0.2 * max(muon.shape[1:]) ** 0.5)
            assert singular.max() < 1.3 and np.quantile(singular, 0.2) > 0.6, name  # as near as five iterations come
        else:
            np.testing.assert_allclose(muon, adam, rtol=1e-5, err_msg=name)
    assert orthogonal == 4 + 3


def test_models_that_differ_in_the_run_alone_share_compiled_programs(tmp_path):
    """Run directory, evaluation, checkpointing and, for decoding, the optimizer are nothing to the model."""
    one = config_of()
    other = config_of(f"train.run_dir={tmp_path}", "eval.questions=7", "checkpoint.every_steps=3", "train.log_every=3")
    faster = config_of("optim.learning_rate=1")
    models = [build_model(config) for config in (one, other, faster)]
    assert len(set(models)) == 1 and models[0] == models[1] == models[2]
    assert build_model(config_of("memory.num_slots=7")) != models[0]
    mesh, batch = make_mesh(one, jax.devices()[:1]), next(batches(1))
    with use_mesh(mesh):
        runs = [(build_model(config), mesh, StepConfig.of(config)) for config in (one, other, faster)]
        steps = [make_train_step(*run) for run in runs]
        assert steps[0] is steps[1] and steps[0] is not steps[2]
        for run, step in zip(runs[:2], steps, strict=False):
            step(create_state(*run), batch)
        assert steps[0]._cache_size() == 1
    params = models[0].init_params(jax.random.key(0))
    before = sampling.append._cache_size()
    for model in models:
        sampling.decode(model, params, [[1, 2]], sampling.start(model, params, 1), max_new_tokens=2)
    # one program for the prompt's segment, one for single tokens
    assert sampling.append._cache_size() - before == 2


def test_learning_rates():
    def rates(**keys):
        overrides = [f"optim.{key}={value}" for key, value in keys.items()]
        config = config_of("optim.learning_rate=1", "train.steps=100", "optim.warmup_steps=10", *overrides).optim
        return np.array([learning_rate(config, 100, jnp.int32(step)) for step in range(100)])

    linear = rates(schedule="linear", decay_fraction=0.3)
    np.testing.assert_allclose(linear[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(linear[10:70], 1)
    np.testing.assert_allclose(linear[70:], (100 - np.arange(70, 100)) / 30, rtol=1e-5)
    cosine = rates(schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose(cosine[[10, 55]], [1, 0.55], rtol=1e-5)
    assert 0.1 < cosine[-1] < 0.11
    np.testing.assert_allclose(rates(schedule="constant")[10:], 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mesh.data=3", "mesh.fsdp=1"), "does not make up 8 devices"),
        (("data.batch_size=4",), "4 lanes do not divide"),
        (("optim.accumulation_steps=2",), "4 lanes do not divide"),
    ],
)
def test_meshes_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config_of(*overrides))


def test_rules_name_only_mesh_axes():
    axes = {axis for _, mesh in RULES if mesh for axis in ((mesh,) if isinstance(mesh, str) else mesh)}
    assert axes == set(MESH_AXES)
