"""Warnings about losses that jump, banks that grow and memories that are dead; none about a run that is well."""

import re

import pytest
from helpers import quick_training, tiny_config

from lm2_jax.common.records import read_records
from lm2_jax.training.health import Health
from lm2_jax.training.loop import train

WELL = {"loss": 2.0, "memory_norm_max": 1.2, "gate_output": 0.5, "gate_input": 0.12, "gate_forget": 0.88}


def warnings(records):
    health = Health()
    return [text for step, record in enumerate(records, 1) for text in health.look({"step": step, **record})]


def test_a_run_that_is_well():
    assert warnings([WELL | {"loss": 8 * 0.99**step, "memory_norm_max": 1 + step / 100} for step in range(600)]) == []
    assert warnings([{"loss": 2.0}] * 100) == []  # no memory
    assert warnings([WELL | {"memory_norm_max": step / 100} for step in range(600)]) == []  # it begins empty
    assert warnings([WELL | {"stage": 0}] * 100 + [WELL | {"stage": 1, "loss": 9.0}] * 100) == []  # longer windows
    assert warnings(([WELL] * 59 + [WELL | {"loss": float("nan")}]) * 5) == []  # steps that were left out


@pytest.mark.parametrize(
    ("ill", "text"),
    [
        ({"gate_output": 0.001}, "step 105: memory is hardly read: gate_output was below 0.01 for 5 records in a row"),
        ({"gate_input": 1e-5}, "step 105: memory is hardly written: .*lower memory.forget_bias"),
        ({"gate_forget": 0.0}, "step 105: memory keeps nothing: .*raise memory.forget_bias"),
        (
            {"memory_norm_max": 50.0},
            "step 105: the memory grows without bound: .* norm 50, and had 1.2 at first",
        ),
        ({"loss": 9.0}, "step 101: the loss jumped to 9, from a median of 2 over 50 records"),
    ],
)
def test_each_is_said_once(ill, text):
    (found,) = warnings([WELL] * 100 + [WELL | ill] * 100)
    assert re.match(text, found)


def test_one_odd_window_says_nothing():
    assert warnings(([WELL] * 30 + [WELL | {"gate_output": 0.0, "memory_norm_max": 99.0}] * 4) * 5) == []


def test_a_run_with_a_dead_memory_says_so(tmp_path, capsys):
    with quick_training():
        train(tiny_config(tmp_path / "run", "memory.forget_bias=30", "train.steps=40", "train.curriculum=[]"))
    assert "warning: step 25: memory is hardly written" in capsys.readouterr().out
    assert read_records(tmp_path / "run" / "metrics.jsonl")[-1]["gate_input"] < 1e-3
