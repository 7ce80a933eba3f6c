"""The study's command from end to end at its smallest, and what its report computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import babilong_report
import numpy as np
import pytest
import reproduce_babilong as study

from lm2_jax.config import parse_config
from lm2_jax.model.sizes import memory_size, parameters

ROOT = Path(__file__).parents[1]


def test_smoke(tmp_path):
    """Trains every phase; a second call finds everything done; the report is drawn from the cells alone."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, **cache, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def run(*flags):
        command = [sys.executable, "tools/reproduce_babilong.py", "--output", tmp_path, "--preset", "smoke", *flags]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run("--workers", "2")
    assert first.count("accuracy after segments") == 7
    assert "accuracy after segments" not in run()
    assert len(list((tmp_path / "cells").glob("*.json"))) == 7
    (tmp_path / "comparison.png").unlink()
    report = run("--report")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert (tmp_path / "report.md").read_text() in report
    for heading in ("## Comparison", "## The grid", "## Ablations of lm2"):
        assert heading in report


@pytest.mark.parametrize("preset", study.PRESETS)
def test_models_are_of_one_size(preset):
    """Equal parameters up to one unit of the feed-forward layers; lm2 and rmt remember as many numbers."""
    preset = study.PRESETS[preset]
    plan = study.Plan(preset, None)
    cells = [*plan.ablations(), *plan.grid()]
    assert len({cell.name for cell in cells}) == len(cells)
    for phase in ("ablation", "comparison"):
        configs = {cell.labels["model"]: cell.config for cell in cells if cell.labels["phase"] == phase}
        model = next(iter(configs.values())).model
        counts = [parameters(config) for config in configs.values()]
        assert max(counts) - min(counts) <= 3 * model.d_model * model.num_layers
        sizes = {name: memory_size(config) for name, config in configs.items()}
        assert len({size for name, size in sizes.items() if name not in ("none", "full attention")}) == 1, sizes


def test_babi_files_are_asked_about(tmp_path):
    """A task's test file, or else another, besides the generator's stories; the config names no directory."""
    for name in ("qa1_single_train.txt", "qa1_single_test.txt", "qa10_indefinite_test.txt", "qa2_two_train.txt"):
        (tmp_path / name).write_text("")
    config = parse_config("{data: {stories: {tasks: [qa1, qa2, qa3]}}}")
    assert study.with_questions(config, None).eval.path is None
    config = study.with_questions(config, tmp_path)
    assert config.eval.path == ("{babi}/qa1_single_test.txt", "{babi}/qa2_two_train.txt")
    assert study.with_files(config, tmp_path).eval.path == tuple(
        str(tmp_path / name) for name in ("qa1_single_test.txt", "qa2_two_train.txt")
    )


def test_intervals():
    """Student's t with 2 degrees of freedom: 4.303 · s / sqrt(3)."""
    mean, half = babilong_report.mean_and_interval([0.2, 0.4, 0.6])
    np.testing.assert_allclose((mean, half), (0.4, 4.303 * 0.2 / 3**0.5))
    assert np.isnan(babilong_report.mean_and_interval([0.3])[1])


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
        sizes["validation_accuracy"] = 0.5
        result = {"labels": labels, **sizes, "accuracy_by_length": table}
        (cells / f"{model}.json").write_text(json.dumps(result))
    report = babilong_report.write_report(tmp_path)
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
    kept = ROOT / "tools" / "results" / "babilong_cpu"
    (tmp_path / "cells").symlink_to(kept / "cells")
    assert babilong_report.write_report(tmp_path) == (kept / "report.md").read_text()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn and drawn == {path.name for path in kept.glob("*.png")}
