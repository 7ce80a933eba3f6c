"""Step time, waiting for data, MFU and goodput, on devices and a clock of the test's own."""

import json
import types

import jax
import numpy as np
import pytest
from helpers import quick_training, short_config, tiny_config
from test_resume import Crash, call_at_step, crash

from lm2_jax.common.errors import UserError
from lm2_jax.common.records import read_records
from lm2_jax.model.sizes import parameters
from lm2_jax.parallel.chips import CHIPS, Chip, chip_of
from lm2_jax.tokenizer import with_vocabulary
from lm2_jax.training import reporting, timing
from lm2_jax.training.loop import train
from lm2_jax.training.timing import StepTimer


class Clock:
    """Stands for the module time; only `wait` lets time pass."""

    def __init__(self, now=0.0):
        self.now = now

    def time(self):
        return 1.75e9 + self.now

    def monotonic(self):
        return 300.0 + self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def mesh_of(kind, count=4):
    devices = np.array([types.SimpleNamespace(device_kind=kind)] * count)
    return types.SimpleNamespace(devices=devices, size=count)


def timer_of(clock, *, kind="TPU v5 lite", before=0.0, kept=0.0, parameters=10**9):
    return StepTimer(clock.time() - before, kept, parameters, mesh_of(kind))


# --- The timer -----------------------------------------------------------------------------------------------------


def test_mfu_is_model_flops_over_the_peak_of_all_chips(clock):
    timer = timer_of(clock)
    clock.wait(20)  # ten steps
    lap = timer.lap(10, tokens=8192)
    assert lap["step_seconds"] == 2
    assert lap["mfu"] == pytest.approx(6 * 1e9 * 8192 / (4 * 197e12) / 2)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3", "TPU v4", "TPU v5 lite podracer"])
def test_mfu_is_not_guessed(clock, kind):
    timer = timer_of(clock, kind=kind)
    clock.wait(1)
    assert timer.lap(1, tokens=8)["mfu"] is None


def test_pauses_and_compilation_are_no_steps_time(clock):
    timer = timer_of(clock)

    def step(state, batch):
        clock.wait(50 if state == "compiles" else 0.25)
        return state, batch

    step = timer.timed(step)
    windows = [types.SimpleNamespace(tokens_BST=np.zeros((2, segments, 4))) for segments in (1, 1, 2)]
    for state, window in zip(("compiles", "known", "compiles"), windows, strict=True):
        step(state, window)
    clock.wait(6)
    with timer.pause():  # a save
        clock.wait(100)
        with timer.pause():
            clock.wait(10)
    lap = timer.lap(3, tokens=8)
    assert lap["step_seconds"] == pytest.approx(6.25 / 3)
    assert lap["goodput"] == pytest.approx(6.25 / (6.25 + 100 + 110))
    clock.wait(3)
    assert timer.lap(3, tokens=8)["step_seconds"] == pytest.approx(1)  # nothing is left over


def test_waiting_for_data_is_a_part_of_the_steps_time(clock):
    timer = timer_of(clock)

    def slow_windows():
        for number in range(4):
            clock.wait(2)
            yield number

    windows = slow_windows()
    assert [timer.next_of(windows) for _ in range(4)] == [0, 1, 2, 3]
    clock.wait(4)
    lap = timer.lap(4, tokens=8)
    assert (lap["data_seconds"], lap["step_seconds"]) == (2, 3)


def test_goodput_counts_restarts_and_no_step_twice(clock):
    """Ten steps of two seconds, of which a crash leaves five; they are done again after a minute of nothing."""
    clock.wait(10)  # compiling
    timer = timer_of(clock, before=10)
    clock.wait(20)
    assert timer.lap(10, tokens=8)["goodput"] == 20 / 30
    clock.wait(60)
    timer = timer_of(clock, before=90, kept=10)
    clock.wait(10)
    assert timer.lap(5, tokens=8)["goodput"] == 20 / 100


def test_goodput_that_is_not_known(clock):
    unknown, back_in_time = timer_of(clock, kept=None), timer_of(clock, before=-3600, kept=0.0)
    clock.wait(1)
    assert unknown.lap(1, tokens=8)["goodput"] is None
    assert back_in_time.lap(1, tokens=8)["goodput"] is None  # the machine's clock was an hour ahead at first


def test_jax_names_each_chip_of_the_table():
    """As libtpu 0.0.42 and jax name the devices of v5e, v5p and v6e."""
    assert [chip_of(kind) for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite")] == list(CHIPS.values())


# --- A run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def known_cpu(monkeypatch):
    """A peak rate for the devices of the tests."""
    chip = Chip(1e12, 1e9, 1e9, 1e9, 1e9, kinds=(jax.devices()[0].device_kind,))
    monkeypatch.setitem(CHIPS, "cpu", chip)
    return chip


def test_a_run_that_crashed_records_its_time(tmp_path, monkeypatch, capsys, known_cpu):
    config = short_config(tmp_path / "run", "train.log_every=2")
    with quick_training():
        call_at_step(monkeypatch, 11, crash)
        with pytest.raises(Crash):
            train(config)
        lost = read_records(tmp_path / "run" / "metrics.jsonl")[8:]
        assert [record["step"] for record in lost] == [9, 10]  # of checkpoint 8
        capsys.readouterr()
        train(config)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    started = json.loads((tmp_path / "run" / "started.json").read_text())["time"]
    kept, last = sum(record["step_seconds"] for record in records), records[-1]
    assert last["goodput"] == pytest.approx(kept / (last["time"] - started), rel=0.02)
    N, tokens = parameters(with_vocabulary(config)), config.data.batch_size * 16
    for record in records:
        assert record["mfu"] == pytest.approx(6 * N * tokens / 1e12 / record["step_seconds"])
        assert 0 <= record["data_seconds"] < record["step_seconds"]
    assert f"MFU {last['mfu']:.0%}  goodput {last['goodput']:.0%}" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_has_no_goodput(run_dir):
    """Its steps have no times, so that nobody knows how long they took."""
    path = run_dir / "metrics.jsonl"
    times = ("step_seconds", "data_seconds", "mfu", "goodput")
    old = [{k: v for k, v in record.items() if k not in times} for record in read_records(path)]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    (run_dir / "started.json").unlink()
    with quick_training():
        train(short_config(run_dir, "train.steps=14"))
    new = read_records(path)[12:]
    assert [record["goodput"] for record in new] == [None, None]
    assert all(record["step_seconds"] > 0 for record in new)


def test_a_damaged_start_is_a_users_mistake(run_dir):
    (run_dir / "started.json").write_text("{}")
    with quick_training(), pytest.raises(UserError, match=r"started\.json: holds no time; remove it"):
        train(short_config(run_dir, "train.steps=14"))


def test_the_line_says_what_is_known(tmp_path, capsys):
    record = {"step": 5, "loss": 1.0, "tokens_per_second": 10.0, "step_seconds": 0.5, "data_seconds": 0.2}
    with reporting.Reporter(tiny_config(tmp_path, "train.trackers=[]"), tmp_path, 0) as reporter:
        reporter.show(record | {"mfu": 0.41, "goodput": 0.9}, "")
        reporter.show(record | {"data_seconds": 0.0, "mfu": None, "goodput": None}, "")
    known, unknown = capsys.readouterr().out.splitlines()
    assert "0.5 s/step  data 40%  MFU 41%  goodput 90%" in known
    assert "0.5 s/step" in unknown and not {"data", "MFU", "goodput"} & set(unknown.split())
