"""Of two processes, one that is killed or fails takes the other along, and both resume and stop together."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest
from helpers import Run, checkpoint_steps, text_overrides, tiny_config
from pairs import config_file, killed_at_last, of_a_pair, start_pair

from lm2_jax.common.errors import UserError
from lm2_jax.common.records import read_records
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.tokenizer import load_tokenizer


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
