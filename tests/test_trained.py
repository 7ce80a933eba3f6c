"""What is trained: groups and patterns, low-rank additions, and parameters that are frozen and held once."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import newest_checkpoint, quick_training, random_checkpoint, random_params, read_arrays, tiny_config

import lm2_jax
from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config, replace
from lm2_jax.convert import engine
from lm2_jax.loading import load_weights
from lm2_jax.model import build_model
from lm2_jax.model.lora import is_addition
from lm2_jax.model.trained import trained_names
from lm2_jax.parallel.mesh import make_mesh, use_mesh
from lm2_jax.segments import run_segments
from lm2_jax.training.loop import train
from lm2_jax.training.loss import loss_weights, window_loss
from lm2_jax.training.state import StepConfig, create_state

V = 32
SMALL = ("model.d_model=16", "model.num_layers=3", "model.d_ff=24", "memory.num_slots=4", f"model.vocab_size={V}")
EVERYWHERE = "model.lora={rank: 3, alpha: 6, targets: [attention, mlp, embedding]}"


def config_of(*overrides):
    return parse_config("", (*SMALL, *overrides))


def logits_of(model, params, tokens):
    return run_segments(model, params, tokens, model.init_memory(len(tokens), params))[0]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["all"], lambda name: True),
        (["memory"], lambda name: "/memory/" in name),
        (["lora"], is_addition),
        (["memory", "lora"], lambda name: "/memory/" in name or is_addition(name)),
        (["blocks/mlp/*"], lambda name: name.startswith("blocks/mlp/")),
        (["bank_blocks/*_norm/scale"], lambda name: name.startswith("bank_blocks/") and name.endswith("_norm/scale")),
    ],
)
def test_groups_and_patterns(asked, expected):
    model = build_model(config_of("memory.num_layers=2", EVERYWHERE))
    names = flatten_dict(model.abstract_params(), sep="/")
    assert trained_names(model, asked) == {name for name in names if expected(name)}
    assert any(expected(name) for name in names)


def test_memory_tokens_of_rmt_are_its_memory():
    assert trained_names(build_model(config_of("memory.kind=rmt")), ["memory"]) == {"memory_tokens"}


@pytest.mark.parametrize(("kind", "asked"), [("none", "memory"), ("lm2", "blocks/conv/*"), ("lm2", "Memory")])
def test_what_takes_nothing_is_refused_with_the_names_that_exist(kind, asked):
    with pytest.raises(UserError, match=r"(?s)optim\.train: .* takes no parameter .*blocks/attention/query"):
        trained_names(build_model(config_of(f"memory.kind={kind}")), ["all", asked])


def test_additions_that_are_not_there_cannot_be_trained():
    with pytest.raises(UserError, match=r"optim\.train lora needs model\.lora"):
        config_of("optim.train=[lora]")
    with pytest.raises(UserError, match="tie_embeddings makes the embedding the head; use embedding"):
        config_of("model.lora.targets=[head]")


@pytest.mark.parametrize("tie", [True, False])
def test_an_addition_changes_nothing_at_first_and_counts_once(tie):
    targets = "[attention, mlp, embedding]" if tie else "[attention, mlp, embedding, head]"
    config = config_of(f"model.tie_embeddings={tie}", f"model.lora={{rank: 3, alpha: 6, targets: {targets}}}")
    model, plain = build_model(config), build_model(replace(config, model={"lora": None}))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, 3, 8)), jnp.int32)

    fresh = model.init_params(jax.random.key(0))
    base = unflatten_dict({n: x for n, x in flatten_dict(fresh, sep="/").items() if not is_addition(n)}, sep="/")
    np.testing.assert_array_equal(logits_of(model, fresh, tokens), logits_of(plain, base, tokens))

    params = random_params(model, 0.1)
    tensors = engine.merged(engine.Checkpoint(config, engine.from_arrays(params, Path()))).params
    leaves = {name: tensor.read() for name, tensor in tensors.items()}
    assert leaves.keys() == flatten_dict(base, sep="/").keys()
    for name, leaf in leaves.items():  # every target is really changed
        weight = flatten_dict(params, sep="/")[name]
        is_target = name.rpartition("/")[2] in config.model.lora.weights and "/memory/" not in name
        assert np.array_equal(leaf, weight) != is_target, name
    found = logits_of(model, params, tokens)
    np.testing.assert_allclose(found, logits_of(plain, unflatten_dict(leaves, sep="/"), tokens), atol=2e-5)
    assert np.abs(found - logits_of(plain, base, tokens)).max() > 0.1


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("answers", [0.02, 0.5, 1.0])
def test_tokens_without_weight_cost_nothing_and_change_nothing(answers, devices):
    config = config_of(EVERYWHERE, "data.batch_size=8")
    model, rng = build_model(config), np.random.default_rng(2)
    params = random_params(model, 0.1)
    hidden = jnp.asarray(rng.normal(size=(8, 2, 16, 16)), jnp.float32)
    batch = lm2_jax.batch.Batch.zeros(8, 2, 16)
    batch.document_BST[:] = rng.random(batch.document_BST.shape) < 0.9
    batch.answers_BST[:] = (rng.random(batch.document_BST.shape) < answers) & (batch.document_BST > 0)
    batch.answers_BST[0] = batch.document_BST[0] > 0  # lanes differ
    batch.targets_BST[:] = rng.integers(0, V, batch.document_BST.shape)
    weights = loss_weights(batch, 0.0)

    def loss(params, hidden, weighted_only):
        sums = window_loss(model, params, hidden, batch, weights, weighted_only)
        return sums.loss, sums

    with use_mesh(make_mesh(config, jax.devices()[:devices])):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        ((value, sums), grads), ((expected, all_sums), expected_grads) = (run(params, hidden, x) for x in (True, False))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert sums.correct == all_sums.correct and sums.answers == sums.tokens == all_sums.answers
    np.testing.assert_allclose(sums.nll / sums.tokens, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# --- Frozen parameters ---------------------------------------------------------------------------------------------

FROZEN = ("optim.train=[memory, lora]", "model.lora.rank=2")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def frozen_run(request, tmp_path_factory):
    """(run directory, its config, the base it started from)."""
    folder = tmp_path_factory.mktemp("frozen")
    base = tiny_config(folder / "base", "train.steps=5", "optim.learning_rate=0.02")
    with quick_training():
        train(base)
        config = tiny_config(
            folder / "run", *FROZEN, f"train.frozen_dtype={request.param}", f"train.init_from={base.train.run_dir}"
        )
        train(config)
    return config, lm2_jax.load(base.train.run_dir)[1]


def test_frozen_parameters_are_the_same_to_the_bit(frozen_run):
    config, base = frozen_run
    _, params = lm2_jax.load(config.train.run_dir)
    base, params = flatten_dict(base, sep="/"), flatten_dict(params, sep="/")
    for name, before in base.items():
        kept = before.astype(config.train.frozen_dtype).astype(jnp.float32)
        assert np.array_equal(params[name], kept) != ("/memory/" in name), name
    assert any(np.any(params[name] != 0) for name in params if name.endswith("_lora_b"))


def test_frozen_parameters_are_held_once(frozen_run):
    config, _ = frozen_run
    run_dir, model = newest_checkpoint(config.train.run_dir).parents[1], lm2_jax.load(config.train.run_dir)[0]
    frozen = read_arrays(run_dir / "frozen" / "params")
    assert {str(array.dtype) for array in frozen.values()} == {config.train.frozen_dtype}
    trained = trained_names(model, config.optim.train)
    paths = set(flatten_dict(model.abstract_params(), sep="/"))
    for step in (run_dir / "checkpoints").iterdir():
        assert len(read_arrays(step / "params")) == len(trained)
    assert len(frozen) == len(paths - trained)
    state = jax.eval_shape(lambda: create_state(model, make_mesh(config, jax.devices()[:1]), StepConfig.of(config)))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_frozen_parameters_of_another_run_are_noticed(frozen_run, tmp_path):
    config, _ = frozen_run
    shutil.copytree(config.train.run_dir, tmp_path / "run")
    moved = replace(config, train={"run_dir": str(tmp_path / "run")})
    shutil.rmtree(tmp_path / "run" / "frozen")
    for use in (lambda: train(replace(moved, train={"steps": 21})), lambda: lm2_jax.load(tmp_path / "run")):
        with quick_training(), pytest.raises(UserError, match=r"run/frozen: the frozen parameters cannot be read"):
            use()
    other = tiny_config(tmp_path / "other", *FROZEN, f"train.frozen_dtype={config.train.frozen_dtype}", "train.seed=7")
    with quick_training():
        train(replace(other, train={"steps": 5}))
    shutil.copytree(tmp_path / "other" / "frozen", tmp_path / "run" / "frozen")
    with pytest.raises(UserError, match="not the frozen parameters that the checkpoint was saved with"):
        lm2_jax.load(tmp_path / "run")


def test_additions_to_a_model_of_another_scale_are_refused(tmp_path):
    path = random_checkpoint(tmp_path / "with", "model.lora.rank=2", "model.lora.alpha=2")
    model = build_model(
        replace(lm2_jax.config.load_config(path / "config.yaml"), model={"lora": {"rank": 2, "alpha": 4.0}})
    )
    initial = model.init_params(jax.random.key(0))
    with pytest.raises(UserError, match=r"lora\.alpha / rank: 1\.0 there, 2\.0 here"):
        load_weights(str(path), model, initial)


# --- A memory for a model without one ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("conv", [0, 4])
def test_a_llama_starts_with_a_memory_and_its_own_logits(first, conv, tmp_path):
    """train.init_from takes a converted Llama for any place of the banks, LoRA and a convolution."""
    path = random_checkpoint(tmp_path / "llama", "memory.kind=none", "model.num_layers=3")
    llama, weights = lm2_jax.load(path)
    settings = {"conv_width": conv, "lora": {"rank": 2, "targets": ["attention", "embedding"]}}
    memory = {"kind": "lm2", "first_layer": first, "num_layers": 1}
    model = build_model(replace(lm2_jax.config.load_config(path / "config.yaml"), model=settings, memory=memory))
    params = load_weights(str(path), model, model.init_params(jax.random.key(3)))
    assert flatten_dict(params).keys() == flatten_dict(model.abstract_params()).keys()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 258, (2, 3, 16)), jnp.int32)
    np.testing.assert_allclose(logits_of(model, params, tokens), logits_of(llama, weights, tokens), atol=1e-5)
    assert np.ptp(params["bank_blocks"]["memory"]["write_query"]) > 0


def test_a_llama_of_other_settings_is_refused(tmp_path):
    path = random_checkpoint(tmp_path / "llama", "memory.kind=none", "model.num_layers=3")
    config = lm2_jax.config.load_config(path / "config.yaml")
    for changes, expected in (
        ({"model": {"rope_scaling": {"factor": 4.0}}}, r"model\.rope_scaling: None there"),
        ({"model": {"num_layers": 4}}, r"blocks/attention/query: \(3, 16, 16\) there, \(4, 16, 16\) in this model"),
        ({"memory": {"kind": "rmt"}}, "memory_tokens: nothing there"),
    ):
        model = build_model(replace(config, **changes))
        with pytest.raises(UserError, match=rf"(?s)holds another model.*{expected}"):
            load_weights(str(path), model, model.init_params(jax.random.key(0)))
