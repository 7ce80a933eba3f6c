"""What goes wrong around a run: full and failing disks, clocks, another process, changed keys; and a run is checked."""

import errno
import itertools
import json
import shutil
import subprocess
import sys
import time

import pytest
from helpers import Run, assert_same_run, checkpoint_steps, quick_training, short_config, text_overrides

from lm2_jax import train as train_module
from lm2_jax.checkpoint import manager as checkpoint_module
from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.common.records import read_records
from lm2_jax.config import save_config
from lm2_jax.training import tensorboard as board
from lm2_jax.training.loop import train
from lm2_jax.training.verify import verify


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_training():
        yield


# --- Disks ----------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))


def read_only_disk(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint_module.ocp.CheckpointManager, "save", refuse)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(full_disk, r"it needs [\d,]+ bytes, the disk has 1,000 left"), (read_only_disk, "Read-only file system")],
)
def test_a_save_that_fails_ends_the_run_which_goes_on_when_the_disk_is_well(
    tmp_path, monkeypatch, whole, fault, reason
):
    config = short_config(tmp_path / "run")
    with monkeypatch.context() as patched:
        save = checkpoint_module.Checkpoints.save

        def save_one(self, state, *rest):
            if int(state.step) == 8:
                fault(patched)
            save(self, state, *rest)

        patched.setattr(checkpoint_module.Checkpoints, "save", save_one)
        message = rf"checkpoints: a checkpoint could not be saved \(OSError: .*{reason}\); the newest intact one is 4\."
        with pytest.raises(TrainingFailed, match=message):
            train(config)
    assert checkpoint_steps(tmp_path / "run") == [4]
    train(config)
    assert_same_run(tmp_path / "run", whole)


def test_metrics_that_cannot_be_written_end_the_run(tmp_path, monkeypatch, whole):
    config = short_config(tmp_path / "run")
    with monkeypatch.context() as patched:

        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(board.Board, "flush", fail)
        with pytest.raises(TrainingFailed, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            train(config)
    train(config)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 2_500_000
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        overrides = ("checkpoint.keep=1000", "train.steps=2000", "eval.every_steps=0")
        save_config(short_config(disk / "run", *overrides), tmp_path / "config.yaml")
        run = Run(tmp_path / "config.yaml", disk / "run", log=tmp_path / "log")
        run.finish(code=1)
        assert "cannot be written" in run.output() or "a checkpoint could not be saved" in run.output()
        newest = max(checkpoint_steps(disk / "run"))
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
        run = Run(tmp_path / "config.yaml", disk / "run", log=tmp_path / "log")
        run.wait_until(lambda run: run.logged_step() > newest + 8)
        run.kill()
        assert f"resuming after step {newest}" in run.output()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- The run directory ----------------------------------------------------------------------------------------------


def test_clocks_may_jump(tmp_path, monkeypatch, whole):
    """Back and on, over and over: it is seen in the records' times, and nowhere else. Orbax bears minutes, no hours."""
    jumps, now = itertools.cycle([0, -120, 120, 5]), time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    train(short_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


# --- Data that is lost under a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: path.unlink(), r"cannot be read any more \(No such file or directory\); put it back"),
        (lambda path: path.write_text(""), r"has changed since it was opened \(it is shorter\)"),
        (lambda path: path.write_bytes(b"\xff" * 50_000), r"has changed since it was opened \('utf-8' codec"),
    ],
)
def test_a_text_that_is_lost_ends_the_run_which_goes_on_when_it_is_back(tmp_path, monkeypatch, fault, message):
    path, save = tmp_path / "text.txt", checkpoint_module.Checkpoints.save
    text = (*text_overrides(path, "packed"), "train.curriculum=[]")
    before = path.read_bytes()

    def save_and_lose(self, state, *rest):
        save(self, state, *rest)
        if int(state.step) == 4:
            fault(path)

    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"text\.txt: " + message):
        patched.setattr(checkpoint_module.Checkpoints, "save", save_and_lose)
        train(short_config(tmp_path / "run", *text, "train.steps=200"))
    path.write_bytes(before)
    assert checkpoint_steps(tmp_path / "run")[0] == 4  # windows that were ready were still trained on
    train(short_config(tmp_path / "run", *text))
    assert checkpoint_steps(tmp_path / "run") == [8, 12]


# --- Checking a run -------------------------------------------------------------------------------------------------


def flip_bits(directory):
    """One in the middle of every file of arrays."""
    for path in directory.rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


def everything_in(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_sound_run(run_dir, capsys):
    before = everything_in(run_dir)
    verify(run_dir)
    assert capsys.readouterr().out.splitlines() == [
        "config.yaml: sound (lm2, 12 steps)",
        *(f"checkpoints/{step}: sound (intact, {tokens(run_dir, step):,} tokens read)" for step in (12, 8)),
        "metrics.jsonl: sound (steps 1 to 12)",
        "summary.json: sound (complete, step 12)",
    ]
    assert everything_in(run_dir) == before


def tokens(run_dir, step):
    return read_records(run_dir / "metrics.jsonl")[step - 1]["tokens"]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda d: flip_bits(d / "checkpoints" / "12" / "params"), "checkpoints/12: damaged: "),
        (lambda d: shutil.rmtree(d / "checkpoints"), "checkpoints: no intact checkpoint"),
        (lambda d: drop_line(d / "metrics.jsonl", 3), "metrics.jsonl: line 4 is of step 5; expected 4"),
        (lambda d: (d / "metrics.jsonl").write_text("{}\n{}\n"), "metrics.jsonl: line 1 is no record: '{}'"),
        (lambda d: (d / "metrics.jsonl").write_text(""), "metrics.jsonl: ends at step 0, before the newest checkpoint"),
        (lambda d: (d / "metrics.jsonl").unlink(), "metrics.jsonl: cannot be read"),
        (lambda d: (d / "summary.json").write_text("["), "summary.json: cannot be read"),
    ],
)
def test_an_unsound_run(run_dir, capsys, damage, found):
    damage(run_dir)
    with pytest.raises(TrainingFailed, match=f"{run_dir}: 1 part\\(s\\) unsound"):
        verify(run_dir)
    assert found in capsys.readouterr().out


def drop_line(path, index):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:index] + lines[index + 1 :]))


def test_verify_is_a_flag_of_train(run_dir, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "--verify", str(run_dir)])
    train_module.main()
    assert "config.yaml: sound" in capsys.readouterr().out
    with pytest.raises(UserError, match="not a run directory"):
        verify(tmp_path)


def test_steps_of_a_half_written_record_do_not_count(run_dir, capsys):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13})[:5])
    verify(run_dir)
    assert "metrics.jsonl: sound (steps 1 to 12)" in capsys.readouterr().out
