"""Curves are drawn of what runs have, and of runs that are going on."""

import dataclasses
import json

import matplotlib.figure
import pytest
from helpers import assert_drawn

from lm2_jax.common.errors import UserError
from lm2_jax.plot_run import main
from lm2_jax.plots.runs import PANELS, plot_runs, read_runs


def write_run(path, steps=300, gates=True, finished=True, timed=True):
    path.mkdir(parents=True)
    records = [
        {"step": s, "tokens": 10 * s, "time": 5.0 + s, "loss": 1 / s, "lr": 1e-3, "tokens_per_second": 100.0}
        | {"grad_norm": None if s == 3 else 1.0, "accuracy": None, "segments": 2, "segment_length": 8}
        | ({"step_seconds": 0.5, "data_seconds": 0.1, "mfu": None, "goodput": 0.9} if timed else {})
        | ({"memory_norm": 1.0, "gate_forget": 0.9, "gate_input": 0.1} if gates else {})
        for s in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        cell = {"questions": "qa1", "accuracy": 0.5, "low": 0.4, "high": 0.6}
        table = [cell | {"segments": segments, "tokens": 8 * segments} for segments in (1, 2, 4)]
        (path / "summary.json").write_text(json.dumps({"accuracy_by_length": table}))
    return path


def test_runs_are_drawn(tmp_path, monkeypatch, capsys, recwarn):
    runs = [write_run(tmp_path / "a" / "lm2"), write_run(tmp_path / "b" / "lm2", gates=False, finished=False)]
    assert [run.name for run in read_runs(runs)] == ["a/lm2", "b/lm2"]
    assert [run.name for run in read_runs(runs[:1])] == ["lm2"]
    output = tmp_path / "runs.png"
    monkeypatch.setattr("sys.argv", ["plot_run.py", *map(str, runs), "--output", str(output), "--x", "time"])
    main()
    assert_drawn(output)
    assert capsys.readouterr().out == f"written: {output}\n"
    assert not [w for w in recwarn if w.category.__name__ != "PyparsingDeprecationWarning"]  # of matplotlib 3.9


def axes_of(monkeypatch, path, runs, panels):
    figures = []
    make = matplotlib.figure.Figure
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda *a, **k: figures.append(make(*a, **k)) or figures[0])
    plot_runs(path, runs, panels)
    return [axis for axis in figures[0].axes if axis.axison]


def test_each_run_has_a_curve_where_it_has_values(tmp_path, monkeypatch):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", gates=False, finished=False, timed=False)])
    axes = axes_of(monkeypatch, tmp_path / "x.png", runs, list(PANELS))
    curves = {axis.get_title(): sum(len(line.get_xdata()) > 2 for line in axis.lines) for axis in axes}
    both = dict.fromkeys(("Loss", "Learning rate", "Throughput, tokens a second", "Gradient norm"), 2)
    alone = {"Accuracy by context length": 1, "Norm of a memory slot": 1, "Memory gates, mean": 2}
    alone |= {"Seconds a step": 2, "Use of the devices": 1}
    assert curves == both | alone


def test_every_set_of_questions_is_drawn_and_named(tmp_path, monkeypatch):
    cell = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    sets = [f"qa{number}" for number in range(1, 7)]
    table = [cell | {"questions": q, "segments": s, "tokens": 8 * s or 5} for q in sets for s in (0, 1, 2)]
    (run,) = read_runs([write_run(tmp_path / "run")])
    (axis,) = axes_of(monkeypatch, tmp_path / "x.png", [dataclasses.replace(run, accuracy=table)], ["length"])
    named = [text.get_text() for text in axis.get_legend().get_texts()]
    assert named == ["run", *sets, "longest in training"]
    curves = [line for line in axis.lines if list(line.get_xdata()) == [8, 16]]
    assert len({(line.get_linestyle(), line.get_marker()) for line in curves}) == len(sets)


def test_questions_without_a_context_have_no_panel(tmp_path, monkeypatch):
    (run,) = read_runs([write_run(tmp_path / "run")])
    alone = [dict(run.accuracy[0]) | {"segments": 0, "tokens": 5}]
    (axis,) = axes_of(monkeypatch, tmp_path / "x.png", [dataclasses.replace(run, accuracy=alone)], ["loss", "length"])
    assert axis.get_title() == "Loss"


def test_a_record_that_is_being_written_waits(tmp_path):
    path = write_run(tmp_path / "run", finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "lo')
    (run,) = read_runs([path])
    assert run.records[-1]["step"] == 300


def test_mistakes(tmp_path):
    going_on = write_run(tmp_path / "going_on", finished=False, gates=False)
    with pytest.raises(UserError, match="nothing for the panels length, gates"):
        plot_runs(tmp_path / "x.png", read_runs([going_on]), ["length", "gates"])
    empty = write_run(tmp_path / "empty", steps=0)
    with pytest.raises(UserError, match=r"not_there: not a run directory(.|\n)*empty: metrics.jsonl holds no step"):
        read_runs([tmp_path / "not_there", empty, going_on])
