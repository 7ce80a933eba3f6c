"""Two processes of four devices train like one of eight, and one that is killed takes the other along."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Run, assert_same_run, checkpoint_steps, text_overrides, tiny_config
from quick import xla_flags

from lm2_jax.common.errors import UserError
from lm2_jax.common.records import read_records
from lm2_jax.config import save_config
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.tokenizer import load_tokenizer

SIZES = ("mesh.data=2", "mesh.fsdp=4", "data.batch_size=8", "eval.every_steps=4", "checkpoint.every_steps=3")


def config_file(run_dir, steps, *overrides):
    path = Path(f"{run_dir}.yaml")
    save_config(tiny_config(run_dir, *SIZES, f"train.steps={steps}", *overrides), path)
    return path


def start_one(run_dir, steps, *overrides):
    return Run(config_file(run_dir, steps, *overrides), run_dir, environment={"XLA_FLAGS": xla_flags(devices=8)})


def of_a_pair():
    """The environments of its two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {"XLA_FLAGS": xla_flags(devices=4), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [shared | {"JAX_PROCESS_ID": str(process)} for process in range(2)]


def start_pair(run_dir, steps, *overrides):
    file = config_file(run_dir, steps, *overrides)
    return [
        Run(
            file,
            run_dir,
            "--distributed",
            log=f"{run_dir}.{process}.log",
            environment=environment,
        )
        for process, environment in enumerate(of_a_pair())
    ]


@contextlib.contextmanager
def killed_at_last(runs):
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()


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


# The service by which processes know of each other is process 0's: when that dies, jax itself ends the others (abort).
@pytest.mark.parametrize(
    ("victim", "codes", "message"),
    [
        (
            1,
            (1,),
            "error: process 1 of 2 has been silent for 30 seconds. This one (process 0) ends too; when the cause",
        ),
        pytest.param(0, (1, -signal.SIGABRT), "another task died", marks=pytest.mark.slow),
    ],
)
def test_when_one_is_killed_the_other_says_so_and_ends_and_both_go_on_and_stop_together(
    tmp_path, victim, codes, message
):
    run_dir = tmp_path / "run"
    long = ("train.curriculum=[]", "eval.every_steps=0")
    with killed_at_last(start_pair(run_dir, 100_000, *long)) as pair:
        pair[0].wait_until(lambda run: len(checkpoint_steps(run_dir)) > 0)
        pair[victim].kill()
        survivor = pair[1 - victim]
        assert survivor.process.wait(60) in codes, survivor.output()
        assert message in survivor.output() or "error: process 0 of 2 is gone" in survivor.output()
    newest = max(checkpoint_steps(run_dir))

    with killed_at_last(start_pair(run_dir, 100_000, *long)) as pair:
        pair[0].wait_until(lambda run: run.logged_step() > newest + 4)
        pair[victim].process.send_signal(signal.SIGTERM)
        for run in pair:
            run.finish(code=130)
        assert f"resuming after step {newest}" in pair[0].output()
        stopped = int(pair[0].output().split("stopped after step ")[1].split(";")[0])
    assert max(checkpoint_steps(run_dir)) == stopped
    assert [r["step"] for r in read_records(run_dir / "metrics.jsonl")] == list(range(1, stopped + 1))


def test_an_error_of_one_ends_both(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as lock, killed_at_last(start_pair(run_dir, 6)) as pair:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which only the first asks for
        for run in pair:
            run.finish(seconds=120, code=2)
            assert f"{run_dir}: another process trains in it" in run.output()
    assert "process 0 of 2 has stopped: " in pair[1].output()


_BROKEN = """
import time
from lm2_jax.parallel import processes as distributed
with distributed.joined():
    if not distributed.is_first():
        1 // 0
    time.sleep(100)
"""


def test_an_unforeseen_error_of_one_ends_both():
    command = [sys.executable, "-c", _BROKEN]
    pair = [
        subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        for environment in of_a_pair()
    ]
    try:
        first, second = (process.communicate(timeout=60)[1] for process in pair)
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [1, 1], first + second
    assert "line 6, in <module>" in second and "error: ZeroDivisionError" in second
    assert "error: process 1 of 2 has stopped: ZeroDivisionError" in first


def test_raw_text_is_for_a_single_process(tmp_path):
    config = tiny_config(tmp_path / "run", *text_overrides(tmp_path / "text.txt", "packed"))
    with pytest.raises(UserError, match=r"data\.source text: raw text is tokenised as it is read, by a single process"):
        Pipeline(config, load_tokenizer(config.tokenizer), own_lanes=[0, 1])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: found 'two'; expected a number"),
        ({}, "the processes of this run cannot be found (coordinator_address should be defined.)"),
    ],
)
def test_processes_that_cannot_be_found(tmp_path, environment, message):
    file = config_file(tmp_path / "run", 6)
    run = Run(file, tmp_path / "run", "--distributed", environment=environment)
    run.finish(seconds=120, code=2)
    assert message in run.output()
