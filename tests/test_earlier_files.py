"""Files that an earlier version wrote (data/earlier: a run of 4 steps, a memory file) keep their meaning."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import checkpoint_steps, quick_training

import lm2_jax
from lm2_jax.config import load_config, replace
from lm2_jax.decoding import sampling
from lm2_jax.decoding.memory_file import load_state
from lm2_jax.training.loop import train
from lm2_jax.training.verify import verify_run

EARLIER = Path(__file__).parent / "data" / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())


@pytest.fixture
def run_dir(tmp_path):
    return shutil.copytree(EARLIER / "run", tmp_path / "run")


def test_a_run_is_sound_and_resumes(run_dir):
    assert not [finding for finding in verify_run(run_dir) if finding.problem]
    config = load_config(run_dir / "config.yaml")
    with quick_training():
        train(replace(config, train={"run_dir": str(run_dir), "steps": 6}))
    assert checkpoint_steps(run_dir) == [6]


def test_a_memory_file_continues_with_the_same_tokens():
    """The file's names of arrays, the random stream of a seed, and everything between them are what they were."""
    model, params = lm2_jax.load(EARLIER / "run" / "checkpoints" / "4")
    options = {"temperature": 1.0, "max_new_tokens": 6}
    state = sampling.start(model, params, 1)
    (new,), state = sampling.decode(model, params, [EXPECTED["prompt"]], state, seed=3, **options)
    assert new == EXPECTED["new"]
    saved = load_state(EARLIER / "memory.safetensors", model, params)
    for field in dataclasses.fields(saved):
        found, expected = getattr(saved, field.name), getattr(state, field.name)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=field.name)
    after, _ = sampling.decode(model, params, [EXPECTED["question"]], saved, seed=4, temperature=1.0, max_new_tokens=12)
    assert after == [EXPECTED["after"]]
