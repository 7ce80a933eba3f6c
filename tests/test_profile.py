"""Traces for XProf: of the steps asked for, under their own names, and never the end of a run."""

import time

import jax
import jax.numpy as jnp
import pytest
from helpers import quick_training, short_config, tiny_config
from test_resume import Crash, call_at_step, crash

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.training.loop import train
from lm2_jax.training.profile import traced
from lm2_jax.training.timing import StepTimer

PROFILE = "train.profile={start: 3, steps: 2}"


def sessions(run_dir):
    """Names of a run's traces, as TensorBoard lists them, and the bytes of each."""
    files = (run_dir / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    return {file.parent.name: file.read_bytes() for file in files}


def test_the_steps_asked_for_are_traced(tmp_path, capsys):
    with quick_training():
        train(short_config(tmp_path / "run", PROFILE))
    (trace,) = sessions(tmp_path / "run").values()
    assert b"jit_train_step" in trace and b"step_num" in trace
    assert list(sessions(tmp_path / "run")) == ["steps_3_to_4"]
    written = f"written: a trace of steps 3 to 4 in {tmp_path / 'run' / 'tensorboard'}"
    assert written in capsys.readouterr().out.replace("\n", "")


def test_traces_of_the_same_second_are_kept_apart(tmp_path):
    """JAX names a trace by the second in which it ends."""
    timer = StepTimer(time.time(), None, 1, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    time.sleep(1 - time.time() % 1)
    for start in (1, 2):
        config = tiny_config(tmp_path, f"train.profile={{start: {start}, steps: 1}}")
        with traced(lambda state, batch: (state + 1, batch), config, tmp_path, start - 1, timer, print) as step:
            step(jnp.ones(2), jnp.ones(2))
    assert sorted(sessions(tmp_path)) == ["steps_1_to_1", "steps_2_to_2"]


def test_a_run_that_is_resumed_behind_them_says_so(run_dir, capsys):
    with quick_training():
        train(short_config(run_dir, "train.steps=13", PROFILE))
    assert "train.profile: steps 3 to 4 are done already; nothing is traced" in capsys.readouterr().out
    assert not sessions(run_dir)


def test_a_crash_in_their_midst(tmp_path, monkeypatch):
    """What there is of the trace is written, and the run that resumes traces them again."""
    config = short_config(tmp_path / "run", "train.profile={start: 6, steps: 5}")
    with quick_training():
        call_at_step(monkeypatch, 9, crash)
        with pytest.raises(Crash):
            train(config)
        assert list(sessions(tmp_path / "run")) == ["steps_6_to_10"]
        train(config)
    assert sorted(sessions(tmp_path / "run")) == ["steps_6_to_10", "steps_9_to_10"]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "run" / "tensorboard" / "plugins").write_text("in the way")
    with quick_training():
        assert train(short_config(tmp_path / "run", PROFILE))["step"] == 12
        assert "warning: train.profile: the trace could not be written" in capsys.readouterr().out
        train(short_config(tmp_path / "next", PROFILE))  # of the same process
    assert list(sessions(tmp_path / "next")) == ["steps_3_to_4"]


def test_a_trace_that_is_going_on_is_left_alone(tmp_path, capsys):
    with quick_training(), jax.profiler.trace(str(tmp_path / "trace")):
        assert train(short_config(tmp_path / "run", PROFILE))["step"] == 12
    assert "warning: train.profile: nothing is traced (Profile has already been started" in capsys.readouterr().out
    assert list((tmp_path / "trace").rglob("*.xplane.pb")) and not sessions(tmp_path / "run")


def test_a_trace_behind_the_end_is_refused():
    with pytest.raises(UserError, match=r"train\.profile ends with step 12, after train\.steps 10"):
        parse_config("{}", ["train.steps=10", "optim.warmup_steps=1", "train.profile={start: 10, steps: 3}"])
