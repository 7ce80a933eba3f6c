"""Where records go beside metrics.jsonl: TensorBoard, Weights & Biases, or nowhere."""

import importlib.util
import json
import sys
import types

import pytest
from helpers import quick_training, short_config
from test_resume import Crash, call_at_step, crash

from lm2_jax.common.errors import UserError
from lm2_jax.common.records import read_records
from lm2_jax.training.loop import train


def losses(run_dir):
    return {record["step"]: record["loss"] for record in read_records(run_dir / "metrics.jsonl")}


def test_no_tracker_is_a_choice(tmp_path):
    with quick_training():
        train(short_config(tmp_path / "run", "train.trackers=[]"))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_said_before_anything_is_made(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    missing = r"train\.trackers: found wandb, whose package is missing; pip install wandb"
    with quick_training(), pytest.raises(UserError, match=missing):
        train(short_config(tmp_path / "run", "train.trackers=[tensorboard, wandb]"))
    assert not (tmp_path / "run").exists()


def test_other_trackers_may_be_taken_for_the_rest_of_a_run(run_dir):
    with quick_training():
        train(short_config(run_dir, "train.steps=13", "train.trackers=[]"))
    assert len(losses(run_dir)) == 13


# --- Weights & Biases ----------------------------------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """wandb, with a server that keeps each run by its id and takes no step below the last."""

    class errors:  # noqa: N801
        class Error(Exception):
            pass

    def __init__(self, logged_in=True):
        super().__init__("wandb")
        self.logged_in, self.modes, self.runs, self.refused = logged_in, [], {}, []

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, *, id, resume, mode="online", **_):
        if mode == "online" and not self.logged_in:
            raise self.errors.Error("No API key configured. Use `wandb login` to log in.\nMore.")
        assert resume == "allow"
        self.modes.append(mode)
        return FakeRun(self, self.runs.setdefault(id, {}))


class FakeRun:
    def __init__(self, wandb, history):
        self._wandb, self._history = wandb, history
        self.step = max(history, default=-1) + 1

    def log(self, record, step):
        if step < self.step:
            self._wandb.refused.append(step)
        else:
            self.step = step
            self._history[step] = record

    def finish(self, exit_code):
        assert exit_code == 0


@pytest.fixture
def fake(monkeypatch):
    def install(**options):
        wandb = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.delitem(sys.modules, "lm2_jax.training.weights_and_biases", raising=False)
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "wandb" or find(name, *rest))
        return wandb

    yield install
    sys.modules.pop("lm2_jax.training.weights_and_biases", None)  # it holds the fake


def crash_and_resume(tmp_path, monkeypatch):
    """A run that crashes after step 10, of which checkpoint 8 is left, and ends."""
    config = short_config(tmp_path / "run", "train.log_every=2", "train.trackers=wandb")
    with quick_training():
        call_at_step(monkeypatch, 11, crash)
        with pytest.raises(Crash):
            train(config)
        train(config)
    return losses(tmp_path / "run")


def test_a_resumed_run_is_one_run_and_repeats_no_step(tmp_path, monkeypatch, fake):
    wandb = fake()
    expected = crash_and_resume(tmp_path, monkeypatch)
    (history,) = wandb.runs.values()
    assert {step: record["loss"] for step, record in history.items()} == expected
    assert wandb.modes == ["online", "online"]
    assert wandb.refused == []
    assert {"goodput", "step_seconds"} <= set(history[12]) and "time" not in history[12]


def test_without_a_login_the_run_is_kept_in_files(tmp_path, monkeypatch, capsys, fake):
    wandb = fake(logged_in=False)
    crash_and_resume(tmp_path, monkeypatch)
    assert wandb.modes == ["offline", "offline"]
    warned = capsys.readouterr().err
    assert "warning: wandb: No API key configured. Use `wandb login` to log in. What it is told is kept in" in warned


def read_history(path):
    """The records of a .wandb file: LevelDB's log format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or kind == 0:
            at += left
            continue
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                yield (
                    record.history.step.num,
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    },
                )


def test_the_real_one_keeps_every_step_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    expected = crash_and_resume(tmp_path, monkeypatch)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    histories = [dict(read_history(file)) for file in files]
    assert len({file.name for file in files}) == 1  # one run, of one id
    assert {step: record["loss"] for history in histories for step, record in history.items()} == expected
