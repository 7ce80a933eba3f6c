"""Two processes of four devices train like one of eight."""

import json
import shutil

import numpy as np
import pytest
from helpers import assert_same_run, checkpoint_steps
from pairs import killed_at_last, start_one, start_pair

from lm2_jax.common.records import read_records


def train_one(run_dir, steps):
    start_one(run_dir, steps).finish()
    return run_dir


def train_pair(run_dir, steps):
    with killed_at_last(start_pair(run_dir, steps)) as pair:
        for run in pair:
            run.finish()
    return run_dir


def data_position(run_dir, step):
    return json.loads((run_dir / "checkpoints" / str(step) / "progress" / "metadata").read_text())["data"]


def assert_same_training(run_dir, expected_dir):
    """Steps, tokens and data position exactly; what is computed, to float noise."""
    records, expected = (read_records(path / "metrics.jsonl") for path in (run_dir, expected_dir))
    assert [r["step"] for r in records] == [r["step"] for r in expected]
    assert [r["tokens"] for r in records] == [r["tokens"] for r in expected]
    for key in ("loss", "grad_norm", "memory_norm"):
        np.testing.assert_allclose([r[key] for r in records], [r[key] for r in expected], rtol=2e-4)
    losses = [[r["validation_loss"] for r in rs if "validation_loss" in r] for rs in (records, expected)]
    np.testing.assert_allclose(*losses, rtol=2e-4)
    assert checkpoint_steps(run_dir) == checkpoint_steps(expected_dir)
    for step in checkpoint_steps(run_dir):
        assert data_position(run_dir, step) == data_position(expected_dir, step)


def cut_back(run_dir, target, step):
    """A copy of a run directory as it was when the checkpoint of `step` was its newest."""
    shutil.copytree(run_dir, target)
    for newer in checkpoint_steps(target):
        if newer > step:
            shutil.rmtree(target / "checkpoints" / str(newer))
    return target


def test_a_pair_trains_like_one_and_each_goes_on_from_the_other(tmp_path):
    one, pair = train_one(tmp_path / "one", 6), train_pair(tmp_path / "pair", 6)
    assert_same_training(pair, one)
    assert_same_training(train_one(cut_back(pair, tmp_path / "then_one", 3), 6), pair)
    assert_same_training(train_pair(cut_back(one, tmp_path / "then_pair", 3), 6), one)
    assert "step 6/6" in (tmp_path / "pair.0.log").read_text()
    assert "step 6/6" not in (tmp_path / "pair.1.log").read_text()  # one of them reports


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_one, train_pair])
def test_each_repeats_itself_to_the_bit(tmp_path, train):
    assert_same_run(train(tmp_path / "again", 6), train(tmp_path / "first", 6))
