"""The study's command from end to end at its smallest, and what its report computes."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_drawn
from quick import xla_flags

from lm2_jax.config import load_config, parse_config, replace
from lm2_jax.model.sizes import memory_size, parameters
from lm2_jax.study.cells import Plan, with_files, with_questions
from lm2_jax.study.presets import PRESETS
from lm2_jax.study.report import write_report
from lm2_jax.study.results import best_setting, mean_and_interval

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_smoke(tmp_path):
    """Trains every phase; a second call finds everything done; the report is drawn from the cells alone."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags(devices=1)}

    def run(*flags):
        command = [
            sys.executable,
            "-m",
            "lm2_jax.reproduce_babilong",
            "--output",
            tmp_path,
            "--preset",
            "smoke",
            *flags,
        ]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run("--workers", "2")
    assert first.count("accuracy after segments") == 8
    assert "accuracy after segments" not in run()
    assert len(list((tmp_path / "cells").glob("*.json"))) == 8
    (tmp_path / "comparison.png").unlink()
    report = run("--report")
    assert_drawn(tmp_path / "comparison.png")
    assert (tmp_path / "report.md").read_text() in report
    for heading in ("## Comparison", "## Every setting", "## Selected, trained twice", "## Ablations of lm2"):
        assert heading in report


@pytest.fixture
def byte_ranks(tmp_path):
    """A file in the format of Llama 3's tokenizer.model."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([rank])) + b" %d\n" % rank for rank in range(256)))
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_models_are_of_one_size(name, byte_ranks):
    """Equal parameters up to a unit of the feed-forward layers; lm2 and rmt remember as many numbers (not in full)."""
    preset = PRESETS[name]
    plan = Plan(preset, {"tokenizer": byte_ranks, "background": Path("book.txt")})
    cells = [*plan.ablations(), *plan.grid()]
    assert len({cell.name for cell in cells}) == len(cells)
    for phase in {cell.labels["phase"] for cell in cells}:
        configs = {cell.labels["model"]: cell.config for cell in cells if cell.labels["phase"] == phase}
        model = next(iter(configs.values())).model
        counts = [parameters(config) for config in configs.values()]
        assert max(counts) - min(counts) <= 3 * model.d_model * model.num_layers * preset.d_ff_multiple
        sizes = {name: memory_size(config) for name, config in configs.items()}
        remembering = {size for model, size in sizes.items() if model not in ("none", "full attention")}
        assert len(remembering) == 1 or name == "full", sizes


def test_full_preset(tmp_path, byte_ranks):
    """Its configs can be written, for `lm2_jax.aot` to compile; files that are missing are named."""

    def run(*flags):
        command = [sys.executable, "-m", "lm2_jax.reproduce_babilong", "--output", tmp_path, "--preset", "full", *flags]
        return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)

    refused = run("--write-configs")
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: --background is missing; the cells of this preset read it\n",
    )
    book = tmp_path / "book.txt"
    book.write_text("It was a bright cold day.")
    files = ("--tokenizer", byte_ranks, "--background", book, "--start", tmp_path)
    done = run("--write-configs", *files)
    assert done.returncode == 0, done.stderr
    configs = [load_config(line) for line in done.stdout.splitlines()]
    starts = {config.train.init_from for config in configs}
    assert starts == {str(tmp_path / kind) for kind in ("lm2", "rmt", "none")}
    for config in configs:
        assert config.data.background == (str(book),)
        memory_tokens = 2 * config.memory.num_slots if config.memory.kind == "rmt" else 0
        assert (config.data.segment_length + memory_tokens) % 128 == 0  # what attention's kernels want


def test_babi_files_are_asked_about(tmp_path):
    """A task's test file, or else another, besides the generator's stories; the config names no directory."""
    for name in ("qa1_single_train.txt", "qa1_single_test.txt", "qa10_indefinite_test.txt", "qa2_two_train.txt"):
        (tmp_path / name).write_text("")
    config = parse_config("{data: {stories: {tasks: [qa1, qa2, qa3]}}}")
    assert with_questions(config, None).eval.path is None
    config = with_questions(config, tmp_path)
    assert config.eval.path == ("{babi}/qa1_single_test.txt", "{babi}/qa2_two_train.txt")
    assert with_files(config, {"babi": tmp_path}).eval.path == tuple(
        str(tmp_path / name) for name in ("qa1_single_test.txt", "qa2_two_train.txt")
    )


def test_intervals():
    """Student's t with 2 degrees of freedom: 4.303 · s / sqrt(3)."""
    mean, half = mean_and_interval([0.2, 0.4, 0.6])
    np.testing.assert_allclose((mean, half), (0.4, 4.303 * 0.2 / 3**0.5))
    assert np.isnan(mean_and_interval([0.3])[1])
    for count, quantile in ((11, 2.228), (12, 2.228), (41, 2.042)):  # of 10, 10 and 30 degrees of freedom
        values = list(range(count))
        assert mean_and_interval(values)[1] == pytest.approx(quantile * np.std(values, ddof=1) / np.sqrt(count))


def test_best_setting():
    """By the first seed's mean over 1 to 8 times the trained length of the generator's questions, and nothing else."""

    def result(setting, seed, *accuracies):
        names = ("qa1 (generator)", "qa1 (generator)", "qa1 (generator)", "qa1_single_test.txt")
        cells = [
            {"questions": name, "segments": segments, "accuracy": accuracy}
            for name, segments, accuracy in zip(names, (0, 4, 32, 4), accuracies, strict=True)
        ]
        labels = {"setting": setting, "seed": seed}
        return {"labels": labels, "trained_segments": 4, "accuracy_by_length": cells}

    near, far, later = (
        result("near", 0, 1, 0.9, 0.4, 1),
        result("far", 0, 0, 0.7, 0.7, 0),
        result("near", 1, 1, 1, 1, 1),
    )
    assert best_setting([near, far, later]) == "far"
    assert best_setting([near]) == "near"


def test_other_seeds():
    """Every model in the first setting, and in its own best where that is another one."""
    plan, first = Plan(PRESETS["cpu"], {}), "4 segments, 2e-3"

    def result(labels):
        right = labels["model"] == "rmt" and labels["setting"] == "8 segments, 2e-3"
        cells = [{"questions": "qa1 (generator)", "segments": 4, "accuracy": 1 if right else 0.5}]
        return {"labels": labels, "trained_segments": 4, "accuracy_by_length": cells}

    cells = list(plan.comparison([result(cell.labels) for cell in plan.grid()]))
    models = ("lm2", "rmt", "none", "full attention")
    expected = {(model, first, seed) for model in models for seed in (1, 2)}
    expected |= {("rmt", "8 segments, 2e-3", seed) for seed in (1, 2)}
    found = [tuple(cell.labels[key] for key in ("model", "setting", "seed")) for cell in cells]
    assert sorted(found) == sorted(expected)


def test_longer():
    """Twice the steps, as a whole and of every stage; nothing else changes."""
    plan = Plan(PRESETS["cpu"], {})
    usual = {cell.labels["model"]: cell.config for cell in plan.grid() if cell.labels["setting"] == "4 segments, 2e-3"}
    seeds: dict[str, list[int]] = {}
    for cell in plan.longer([]):
        seeds.setdefault(cell.labels["model"], []).append(cell.labels["seed"])
    assert seeds == {"lm2": [0, 1, 2], "rmt": [0, 1], "none": [0], "full attention": [0, 1]}
    longer = {cell.labels["model"]: cell.config for cell in plan.longer([]) if cell.labels["seed"] == 0}
    for model, config in longer.items():
        assert config.train.steps == 2 * usual[model].train.steps
        assert [stage.steps for stage in config.train.curriculum] == [
            stage.steps and 2 * stage.steps for stage in usual[model].train.curriculum
        ]
        same = {"train": {"steps": 4800, "curriculum": []}}
        assert replace(config, **same) == replace(usual[model], **same)


def test_gains(tmp_path):
    """lm2 / rmt over 1 to 8 times the trained length, nothing outside it."""
    cells = tmp_path / "cells"
    cells.mkdir()
    accuracy = {
        "lm2": (0.1, 0.9, 0.9, 0.6, 0.6, 0.1),
        "rmt": (1, 0.9, 0.3, 0.2, 0.1, 1),
        "none": (1, 0.2, 0.2, 0.2, 0.2, 1),
    }
    for model, values in accuracy.items():
        table = [
            {"questions": name, "segments": segments, "accuracy": value * share}
            for name, share in {"qa1 (generator)": 1, "qa2 (generator)": 0.5, "qa1_single_test.txt": 0.9}.items()
            for segments, value in zip((0, 4, 8, 16, 32, 64), values, strict=True)
        ]
        labels = {"phase": "comparison", "model": model, "setting": "4", "seed": 0}
        sizes = {"parameters": 1, "memory_size": 1, "tokens": 1, "seconds": 1, "trained_segments": 4}
        result = {"labels": labels, **sizes, "accuracy_by_length": table}
        (cells / f"{model}.json").write_text(json.dumps(result))
    report = write_report(tmp_path)
    for name, mean in {
        "qa1": "75.0%",
        "qa2": "37.5%",
        "qa1 (bAbI's file)": "67.5%",
        "all of the generator": "56.2%",
        "all of bAbI's files": "67.5%",
    }.items():
        assert f"| {name} | {mean} | 2.00 | 3.75 |" in report


def test_kept_results(tmp_path):
    """The report in the repository is what its cells say, and all its pictures can be drawn."""
    kept = ROOT / "docs" / "results" / "babilong_cpu"
    (tmp_path / "cells").symlink_to(kept / "cells")
    assert write_report(tmp_path) == (kept / "report.md").read_text()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn and drawn == {path.name for path in kept.glob("*.png")}


@pytest.mark.parametrize("heading", ["## Every setting", "## Selected", "## Ablations of lm2"])
def test_tables_in_study(heading):
    """The study shows the first table of these sections of the report."""
    report = (ROOT / "docs" / "results" / "babilong_cpu" / "report.md").read_text()
    table = "|" + report.split(heading)[1].split("\n|", 1)[1].split("\n\n")[0]
    assert table.count("\n") > 2 and table in (ROOT / "docs" / "results" / "study.md").read_text()
