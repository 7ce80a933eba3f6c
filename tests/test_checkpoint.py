"""Checkpoints are kept and loaded, foreign directories refused, meshes may change; non-finite steps."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    checkpoint_steps,
    quick_training,
    read_arrays,
    short_config,
)

import lm2_jax
from lm2_jax.checkpoint.manager import Checkpoints
from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.records import read_records
from lm2_jax.config import replace, save_config
from lm2_jax.data.lanes import make_iterator
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.model import build_model
from lm2_jax.parallel.mesh import make_mesh, use_mesh
from lm2_jax.tokenizer import check_vocabulary, load_tokenizer
from lm2_jax.training import loop
from lm2_jax.training.loop import train
from lm2_jax.training.state import StepConfig, create_state, shardings_of
from lm2_jax.training.step import make_train_step

KEEP = 2


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_training():
        yield


def test_retention(whole):
    assert checkpoint_steps(whole) == [8, 12]


# --- The config of a run directory ----------------------------------------------------------------------------------


def test_another_config_is_refused(run_dir):
    other = short_config(run_dir, "optim.learning_rate=0.01", "memory.num_slots=8", "train.steps=16")
    before = (run_dir / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        train(other)
    lines = str(caught.value).splitlines()
    assert str(run_dir) in lines[0]
    assert sorted(lines[1:-1]) == [
        "  memory.num_slots: 4 in the run directory, 8 now",
        "  optim.learning_rate: 0.002 in the run directory, 0.01 now",
    ]
    assert lines[-1].startswith("What may change between runs: train.run_dir, train.steps")
    assert (run_dir / "config.yaml").read_bytes() == before


def test_steps_may_change(run_dir):
    records = read_records(run_dir / "metrics.jsonl")
    train(short_config(run_dir, "train.steps=14"))
    longer = read_records(run_dir / "metrics.jsonl")
    assert longer[:12] == records
    assert [record["step"] for record in longer] == list(range(1, 15))


# --- Loading --------------------------------------------------------------------------------------------------------


def test_load(whole):
    tokens_BT = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    saved = read_arrays(whole / "checkpoints" / "12" / "params")
    logits = []
    for path in (whole, whole / "checkpoints" / "12"):
        model, params = lm2_jax.load(path)
        loaded = {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
        assert loaded.keys() == saved.keys()
        for name, array in loaded.items():
            np.testing.assert_array_equal(array, saved[name])
        logits.append(model.apply({"params": params}, tokens_BT, model.init_memory(2, params))[0])
    np.testing.assert_array_equal(*logits)
    assert np.isfinite(logits[0]).all()
    _, older = lm2_jax.load(whole / "checkpoints" / "8")
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(older), jax.tree.leaves(params), strict=True))


def test_load_what_is_no_checkpoint(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("nothing")
    (tmp_path / "unsaved").mkdir()
    save_config(short_config(tmp_path / "unsaved"), tmp_path / "unsaved" / "config.yaml")
    for name, message in (
        ("missing", "no such directory"),
        ("foreign", "neither"),
        ("unsaved", "without a checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            lm2_jax.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


# --- Meshes ---------------------------------------------------------------------------------------------------------


def test_one_device_to_eight_and_back(tmp_path):
    config = short_config(tmp_path, "mesh={data: 2, fsdp: 2, tensor: 2}")
    config = check_vocabulary(config, load_tokenizer(config.tokenizer))
    model, settings = build_model(config), StepConfig.of(config)
    one = make_mesh(replace(config, mesh={"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    eight = make_mesh(config)
    states = {}
    for seed, mesh in enumerate((one, eight)):
        with use_mesh(mesh):
            run = model, mesh, dataclasses.replace(settings, seed=seed)
            states[mesh] = create_state(*run), shardings_of(*run)
    saved = None
    for mesh in (one, eight, one):
        with use_mesh(mesh):
            state, shardings = states[mesh]
            checkpoints = Checkpoints(tmp_path, config.checkpoint)
            if saved is None:
                saved = jax.device_get(state)
            else:
                restored, progress = checkpoints.restore_latest(state, shardings)
                assert progress == {"mark": int(saved.step)}
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
                assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, restored, shardings)))
                state = restored
                saved = saved.replace(step=saved.step + 1)
            if mesh is eight:
                assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
            state = jax.device_put(saved, shardings)
            checkpoints.save(state, {"mark": int(saved.step)}, config)
            checkpoints.close()


# --- Steps that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_non_finite_step_is_skipped(kind, tmp_path):
    config = short_config(tmp_path, f"memory.kind={kind}")
    tokenizer = load_tokenizer(config.tokenizer)
    config = check_vocabulary(config, tokenizer)
    model, mesh = build_model(config), make_mesh(config, jax.devices()[:1])
    window = next(make_iterator(Pipeline(config, tokenizer).training(config.stages[0]), 0))
    window.reset_BS[:] = False  # so that all lanes read the memory that is given
    with use_mesh(mesh):
        run = model, mesh, StepConfig.of(config)
        state, shardings, step = create_state(*run), shardings_of(*run), make_train_step(*run)
        state, metrics = step(state, window)
        good = jax.device_get(state)
        assert metrics["skipped"] == 0

        # Lane 1 holds a NaN: the step is skipped, only its memory starts afresh
        broken = jax.tree.map(lambda x: _with_nan(x, 1, model.kind.lane_axis), good.memory)
        state, metrics = step(jax.device_put(good.replace(memory=broken), shardings), window)
        after = jax.device_get(state)
        assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == metrics["skipped_in_a_row"] == 1
        jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (good.params, good.opt_state))
        assert after.step == good.step + 1
        for found, start in zip(
            jax.tree.leaves(after.memory), jax.tree.leaves(model.init_memory(4, good.params)), strict=True
        ):
            found, start = (np.moveaxis(np.asarray(x), model.kind.lane_axis, 0) for x in (found, start))
            assert np.isfinite(found).all()
            np.testing.assert_array_equal(found[1], start[1])
            assert all((found[lane] != start[lane]).any() for lane in (0, 2, 3))

        # The next one is good again
        state, metrics = step(state, window)
        assert np.isfinite(metrics["loss"])
        assert metrics["skipped"] == 1 and metrics["skipped_in_a_row"] == 0
        assert any(
            (np.asarray(a) != b).any()
            for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(good.params), strict=True)
        )

        # An infinite parameter never mends itself
        infinite = jax.tree.map(np.copy, good.params)
        jax.tree.leaves(infinite)[0].flat[:] = np.inf
        state = jax.device_put(good.replace(params=infinite), shardings)
        for count in (1, 2, 3):
            state, metrics = step(state, window)
            assert metrics["skipped_in_a_row"] == metrics["skipped"] == count


def _with_nan(x, lane, lane_axis):
    x = np.moveaxis(np.array(x), lane_axis, 0)
    x[lane].flat[0] = np.nan
    return np.moveaxis(x, 0, lane_axis)


def test_too_many_skipped_steps_end_the_run(tmp_path, monkeypatch, capsys):
    def create_broken(*arguments):
        state = create_state(*arguments)
        return state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))

    monkeypatch.setattr(loop, "create_state", create_broken)
    config = short_config(tmp_path / "run")
    with pytest.raises(TrainingFailed, match=r"6 steps in a row up to step 6 .* train.max_skipped_steps"):
        train(config)
    records = read_records(Path(config.train.run_dir) / "metrics.jsonl")
    assert [record["skipped_in_a_row"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] is None for record in records)

    with pytest.raises(SystemExit) as caught:
        run_command(lambda: train(config))
    assert caught.value.code == 1
    assert "error: " in capsys.readouterr().err
