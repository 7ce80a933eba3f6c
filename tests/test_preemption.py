"""A run that is told to leave saves and ends, and the same command goes on to the bit."""

import os
import signal

import pytest
from helpers import Run, assert_same_run, checkpoint_steps, quick_training, tiny_config
from jax._src import distributed
from pairs import killed_at_last, start_pair

from lm2_jax.config import save_config
from lm2_jax.parallel.processes import stop_signals
from lm2_jax.training.loop import train


class Notice:
    """JAX's manager of pre-emption notices, in a run whose machine is taken away after a step."""

    def __init__(self, step):
        self.step, self.asked = step, []

    def reached_sync_point(self, step):
        self.asked.append(step)
        return step == self.step


def test_jaxs_notice_stops_a_run_of_one_process(tmp_path, monkeypatch, capsys):
    config, notice = tiny_config(tmp_path / "run"), Notice(7)
    with quick_training():
        train(tiny_config(tmp_path / "whole"))
        with monkeypatch.context() as patched:
            patched.setattr(distributed.global_state, "client", object())
            patched.setattr(distributed.global_state, "preemption_sync_manager", notice)
            capsys.readouterr()
            with pytest.raises(KeyboardInterrupt):
                train(config)
        assert "stopped after step 7; the same command resumes there" in capsys.readouterr().out
        assert checkpoint_steps(tmp_path / "run") == [5, 7]
        assert set(notice.asked) == set(range(1, 8))  # JAX wants to be asked after every step
        train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_save_that_outlives_the_grace_period_costs_the_steps_since_the_last(tmp_path):
    """SIGTERM, and SIGKILL while the run saves: it resumes from the checkpoint before."""
    for name in ("whole", "killed"):
        save_config(tiny_config(tmp_path / name, "checkpoint.every_steps=6"), tmp_path / f"{name}.yaml")
    Run(tmp_path / "whole.yaml", tmp_path / "whole").finish()
    run = Run(tmp_path / "killed.yaml", tmp_path / "killed")
    run.wait_until(lambda run: 6 in checkpoint_steps(run.run_dir))
    run.process.send_signal(signal.SIGTERM)
    run.wait_until(lambda run: run.saves_under_way())
    run.kill()
    newest, situation = checkpoint_steps(tmp_path / "killed")[-1], run.situation()
    again = Run(tmp_path / "killed.yaml", tmp_path / "killed")
    again.finish()
    assert f"resuming after step {newest}" in again.output(), situation
    assert_same_run(tmp_path / "killed", tmp_path / "whole", note=situation)


def test_a_run_of_one_process_needs_no_service(monkeypatch):
    """JAX raises RuntimeError where its service is switched off."""
    monkeypatch.setattr(distributed.global_state, "client", object())
    with stop_signals() as stop_requested:
        assert not stop_requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested(2)


def test_several_processes_need_the_service(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_PREEMPTION_SERVICE", "false")
    with killed_at_last(start_pair(tmp_path / "run", 6)) as pair:
        for run in pair:
            run.finish(seconds=120, code=2)
            assert "JAX_ENABLE_PREEMPTION_SERVICE: found false" in run.output()
