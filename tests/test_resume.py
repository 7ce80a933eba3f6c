"""A run that is killed and started again equals one that never stopped, to the bit."""

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers import (
    Run,
    assert_same_run,
    checkpoint_steps,
    newest_checkpoint,
    quick_training,
    text_overrides,
    tiny_config,
)

from lm2_jax.checkpoint.manager import Checkpoints
from lm2_jax.common.errors import UserError
from lm2_jax.common.records import read_records
from lm2_jax.config import save_config
from lm2_jax.data.pipeline import Pipeline
from lm2_jax.tokenizer import load_tokenizer
from lm2_jax.training import loop
from lm2_jax.training.curriculum import Progress
from lm2_jax.training.loop import train
from lm2_jax.training.metrics_log import MetricsLog
from lm2_jax.training.run_dir import check_data

KINDS = ("lm2 stories", "rmt stories", "lm2 packed text", "lm2 stream")


def config_of(kind, run_dir, *overrides):
    """The runs of the study; `run_dir`'s directory also takes the text."""
    memory, data = kind.split(" ", 1)
    if data == "stories":
        return tiny_config(run_dir, f"memory.kind={memory}", *overrides)
    boundaries = data.split()[0]
    return tiny_config(run_dir, *text_overrides(run_dir.parent / "text.txt", boundaries), *overrides)


def write_configs(tmp_path, kind, *overrides):
    """(config file, run directory) of the run to kill and of the one to compare it with."""
    pairs = []
    for name in ("killed", "whole"):
        config = config_of(kind, tmp_path / name, *overrides)
        save_config(config, tmp_path / f"{name}.yaml")
        pairs.append((tmp_path / f"{name}.yaml", tmp_path / name))
    return pairs


# --- Crashes in this process ----------------------------------------------------------------------------------------


class Crash(Exception):
    pass


@pytest.fixture
def quick():
    with quick_training():
        yield


def call_at_step(monkeypatch, step, action, *, before_save=False):
    """Runs `action` once, in the loop after `step` was started or before it is saved."""
    owner, name = (Checkpoints, "save") if before_save else (MetricsLog, "add")
    original = getattr(owner, name)

    def wrapped(self, *arguments):
        if (arguments[1]["step"] if before_save else arguments[1].step) == step:
            monkeypatch.setattr(owner, name, original)
            action()
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, wrapped)


def crash():
    raise Crash


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("rmt stories", ()),
        pytest.param("armt stories", ("train.curriculum=[]",), marks=pytest.mark.slow),
        pytest.param("lm2 packed text", ("train.curriculum=[]", "memory.kind=delta"), marks=pytest.mark.slow),
        ("lm2 packed text", ("train.curriculum=[]", "optim.kind=muon")),
        ("lm2 packed text", ("train.curriculum=[]", "model.window=12", "model.sinks=2", "model.max_distance=20")),
        ("lm2 stream", ("model.lora.rank=2", "optim.train=[memory, lora]", "train.frozen_dtype=bfloat16")),
    ],
    ids=("rmt", "armt", "delta", "packed", "window", "frozen"),
)
def test_crashed_run_equals_whole_run(kind, overrides, tmp_path, monkeypatch, quick):
    train(config_of(kind, tmp_path / "whole", *overrides))
    config = config_of(kind, tmp_path / "crashed", *overrides)
    # Without a checkpoint, before a save, after the stage changed, before the last save
    for step, before_save in ((3, False), (5, True), (12, False), (18, False), (20, True)):
        call_at_step(monkeypatch, step, crash, before_save=before_save)
        with pytest.raises(Crash):
            train(config)
    for _ in range(2):  # a finished run that is started again changes nothing
        train(config)
        assert_same_run(tmp_path / "crashed", tmp_path / "whole")
    stages = {record["stage"] for record in read_records(tmp_path / "crashed" / "metrics.jsonl")}
    assert stages == set(range(len(config.stages)))


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_signal_saves_and_leaves(number, tmp_path, monkeypatch, capsys, quick):
    train(config_of("rmt stories", tmp_path / "whole"))
    config = config_of("rmt stories", tmp_path / "stopped")
    handler = signal.getsignal(number)
    call_at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), number))
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert "stopped after step 7; the same command resumes there" in capsys.readouterr().out
    assert signal.getsignal(number) == handler
    assert checkpoint_steps(tmp_path / "stopped") == [5, 7]
    assert [record["step"] for record in read_records(tmp_path / "stopped" / "metrics.jsonl")] == list(range(1, 8))
    assert not (tmp_path / "stopped" / "summary.json").exists()
    train(config)
    assert "resuming after step 7" in capsys.readouterr().out
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_signal_after_the_last_step(tmp_path, monkeypatch, quick):
    """What is left to do then can be done again: the run ends at once, and the same command ends it."""
    config = config_of("rmt stories", tmp_path / "stopped", "train.steps=4", "train.curriculum=[]")

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # which the signal ends

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(loop, "accuracy_by_length", interrupt)
            train(config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint_steps(tmp_path / "stopped") == [4] and not (tmp_path / "stopped" / "summary.json").exists()
    train(config)
    assert (tmp_path / "stopped" / "summary.json").exists()


def test_answers_of_a_stage_do_not_end_the_next(tmp_path, quick):
    """The first stage ends between two looks at the answers (train.log_every)."""
    stages = "[{segments: 1, segment_length: 16, steps: 3}, {segments: 2, segment_length: 16}]"
    config = config_of(
        "rmt stories", tmp_path / "run", f"train.curriculum={stages}", "train.steps=3", "checkpoint.every_steps=3"
    )
    train(config)
    progress = json.loads((newest_checkpoint(tmp_path / "run") / "progress" / "metadata").read_text())
    assert (progress["step"], progress["stage"]) == (3, 1)
    assert (progress["correct"], progress["answers"]) == (0, 0)


def test_changed_data_is_not_gone_on_with(tmp_path, quick):
    config = config_of("lm2 packed text", tmp_path / "run", "train.curriculum=[]", "train.steps=4")
    train(config)
    path = Path(config.data.path[0])
    text = path.read_text()
    for changed in (text + "One more line.\n", text.upper()):  # the second of the same size
        path.write_text(changed)
        with pytest.raises(UserError, match="have changed since its checkpoint"):
            train(config)
    path.write_text(text)
    train(config)


def test_a_run_that_knows_only_sizes_resumes(tmp_path):
    """Saved by an earlier version; from now on it knows contents."""
    config = config_of("lm2 packed text", tmp_path / "run", "train.curriculum=[]")
    pipeline = Pipeline(config, load_tokenizer(config.tokenizer))
    path = Path(config.data.path[0])
    lines = [load_tokenizer(config.tokenizer).fingerprint(), f"path {path.name} {path.stat().st_size}"]
    saved = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    progress = check_data(Progress(step=4, data_fingerprint=saved), pipeline, tmp_path)
    assert progress.data_fingerprint == pipeline.fingerprint() != saved
    path.write_text(path.read_text() + "One more line.\n")
    for fingerprint in (saved, progress.data_fingerprint):
        with pytest.raises(UserError, match="have changed since its checkpoint"):
            check_data(Progress(step=4, data_fingerprint=fingerprint), pipeline, tmp_path)


# --- SIGKILL in another process -------------------------------------------------------------------------------------


def after_seconds(seconds):
    return lambda run: time.time() - run.started >= seconds


def logged(step):
    return lambda run: run.logged_step() >= step


def saving(run):
    return bool(run.saves_under_way())


def saving_step(step):
    return lambda run: any(name.startswith(f"{step}.") for name in run.saves_under_way())


def saved(step):
    return lambda run: step in checkpoint_steps(run.run_dir)


def said(text):
    return lambda run: text in run.output()


def test_killed_run_equals_whole_run(tmp_path):
    (config_file, run_dir), (whole_config_file, whole_dir) = write_configs(tmp_path, "lm2 stories")
    Run(whole_config_file, whole_dir).finish()
    kills = []
    for name, moment in (("during a save", saving), ("after step 12", logged(12))):
        run = Run(config_file, run_dir)
        run.wait_until(moment)
        run.kill()
        kills.append(f"{name}: {run.situation()}")
    Run(config_file, run_dir).finish()
    assert_same_run(run_dir, whole_dir, note="\n".join(kills))


def ten_moments(rng, steps):
    """(name, when, seconds to wait on top, options of the run), in the order of a run's progress."""
    end = said("asking")  # stories only; the others are caught when the last checkpoint is complete
    return (
        ("at start-up", after_seconds(rng.uniform(0.2, 4)), 0, {}),
        ("while compiling", said("run directory"), rng.uniform(0, 3), {"cold": True}),
        ("after a step, nothing saved yet", logged(rng.randint(1, 4)), 0, {}),
        ("during a save", saving, rng.uniform(0, 0.02), {}),
        ("right after a save", saved(5 * rng.randint(3, 4)), 0, {}),
        ("while restoring", said("restoring"), rng.uniform(0, 0.05), {"announce_restore": True}),
        ("after a step", logged(rng.randint(27, 33)), rng.uniform(0, 0.02), {}),
        ("during a save", saving_step(5 * rng.randint(9, 10)), rng.uniform(0, 0.02), {}),
        ("during the last save", saving_step(steps), 0, {}),
        ("at the end", end, rng.uniform(0, 1), {}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("round", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_ten_kills(kind, round, tmp_path):
    """All of them: 200 kills, at moments drawn by lot."""
    steps, rng = 60, random.Random(f"ten kills of {kind}, round {round}")
    (config_file, run_dir), (whole_config_file, whole_dir) = write_configs(tmp_path, kind, f"train.steps={steps}")
    Run(whole_config_file, whole_dir).finish()
    kills = []
    for name, moment, seconds, options in ten_moments(rng, steps):
        if name == "at the end" and "stories" not in kind:
            moment, seconds = saved(steps), 0
        run = Run(config_file, run_dir, **options)
        try:
            run.wait_until(moment)
            time.sleep(seconds)  # the moment itself is drawn by lot
        finally:
            alive = run.process.poll() is None
            run.kill()
        kills.append(f"{len(kills) + 1:2}. {name}: {run.situation()}")
        print(f"{kind} {kills[-1]}", flush=True)
        assert alive, f"the run ended before it was killed {name}:\n{run.output()}"
    Run(config_file, run_dir).finish()
    assert_same_run(run_dir, whole_dir, note="\n".join(kills))
    print(f"{kind}: {len(kills)} kills, {steps} steps, equal", flush=True)
