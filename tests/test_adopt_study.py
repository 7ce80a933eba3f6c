"""The study of a pretrained Llama with a memory: cells that resume, and what is computed from their results."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from helpers import assert_drawn, random_checkpoint, text_overrides, tiny_config

from lm2_jax import reproduce_adopt, reproduce_babilong
from lm2_jax.common.errors import UserError
from lm2_jax.config import replace
from lm2_jax.model import build_model
from lm2_jax.model.trained import trained_names
from lm2_jax.study.adopt import TRAINED, Cell, cells
from lm2_jax.study.adopt_report import mean_loss, paired_difference, write_report
from lm2_jax.study.adopt_runner import run_base, run_cell


def result_of(name, nats, seed=0):
    """Two documents of three segments of 4 tokens, the second of two and a half."""
    documents = [
        {"document": i, "tokens": n, "nats_by_segment": list(row), "nats_by_distance": [float(sum(row))]}
        for i, (n, row) in enumerate(zip((12, 10), nats, strict=True))
    ]
    return {"part": "books", "trained": name, "seed": seed, "tokens": 5, "segment_length": 4, "documents": documents}


def test_differences_are_paired_by_document():
    one = result_of("memory and LoRA", [(4.0, 4.0, 2.0), (8.0, 8.0, 3.0)])
    other = result_of("LoRA", [(4.0, 4.0, 6.0), (8.0, 8.0, 4.0)])
    difference = paired_difference(one, other, 2)
    assert (difference.nats, difference.documents) == (pytest.approx(-5 / 6), 2)
    rest = np.array([-4 - 4 * difference.nats, -1 - 2 * difference.nats]) / 3  # over the mean of 4 and 2 tokens
    assert difference.half == pytest.approx(12.71 * np.std(rest, ddof=1) / math.sqrt(2))
    assert mean_loss(one, 2) == pytest.approx(5 / 6) and math.isnan(mean_loss(one, 3))
    with pytest.raises(ValueError, match="not the same"):
        paired_difference(one, replace_document(other), 2)


def test_a_difference_that_is_the_same_in_every_token_is_certain():
    """However long the documents are."""
    one = result_of("memory and LoRA", [(4.0, 4.0, 2.0), (8.0, 8.0, 3.0)])
    other = result_of("LoRA", [(4.0, 4.0, 2.8), (8.0, 8.0, 3.4)])
    difference = paired_difference(one, other, 2)
    assert (difference.nats, difference.half) == (pytest.approx(-0.2), pytest.approx(0, abs=1e-9))


def replace_document(result):
    documents = [{**document, "tokens": document["tokens"] + 1} for document in result["documents"]]
    return {**result, "documents": documents}


def run_command(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("module", [reproduce_adopt, reproduce_babilong])
def test_nothing_to_report(module, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cells holds no result yet"):
        run_command(module, monkeypatch, "--report", "--output", tmp_path / "missing")


def test_a_study_has_a_seed(tmp_path, monkeypatch):
    given = ("--start", tmp_path, "--texts", "a.txt", "--held-out", "b.txt", "--output", tmp_path)
    with pytest.raises(UserError, match="--seeds: found 0; expected 1 or more"):
        run_command(reproduce_adopt, monkeypatch, "--seeds", 0, *given)


@pytest.mark.parametrize("option", ["--output", "--start", "--texts", "--held-out", "--questions"])
def test_paths_are_of_this_machine(option, monkeypatch):
    with pytest.raises(UserError, match="give a path of this machine here"):
        run_command(reproduce_adopt, monkeypatch, "--report", "--output", "x", option, "gs://bucket/x")


def test_cells_train_what_they_say(tmp_path):
    """On the real model's shapes: names exist, nothing below the first bank is trained, and seeds differ."""
    for part, count in (("books", 2 * 2), ("facts", 2 * len(TRAINED))):
        planned = cells(part, tmp_path, ["novel.txt"], [], seeds=2)
        assert len({cell.name for cell in planned}) == count
        for cell in planned:
            for leg in cell.legs:
                names = trained_names(build_model(leg), leg.optim.train)
                assert names and not any(name.startswith(("first_blocks/", "embedding")) for name in names)
                assert any("/memory/" in name for name in names) == ("memory" in cell.trained)


@pytest.mark.slow
def test_a_cell_is_trained_in_legs_once(tmp_path):
    leg = tiny_config(
        "unused",
        "train.curriculum=[]",
        "train.steps=3",
        "eval.lengths=[2]",
        "model.vocab_size=185",
        "data.batch_size=8",
    )
    start = tmp_path / "start"
    random_checkpoint(start, "model.vocab_size=185", "tokenizer.kind=stories")
    cell = Cell("facts", "memory", 0, (leg, replace(leg, model={"window": 8, "sinks": 2})))
    result = run_cell(cell, start, [], tmp_path)
    assert result["tokens"] == sum(
        json.loads((tmp_path / "runs" / f"{cell.name}-{n}" / "summary.json").read_text())["tokens"] for n in (1, 2)
    )
    assert [length["segments"] for length in result["accuracy_by_length"]] == [2]
    assert (
        f"init_from: {tmp_path / 'runs' / cell.name}-1"
        in (tmp_path / "runs" / f"{cell.name}-2" / "leg.yaml").read_text()
    )
    (tmp_path / "runs" / f"{cell.name}-1" / "leg.yaml").unlink()
    assert run_cell(cell, start, [], tmp_path) == result  # nothing is trained again
    assert not (tmp_path / "runs" / f"{cell.name}-1" / "leg.yaml").exists()
    longer = dataclasses.replace(cell, legs=(replace(leg, train={"steps": 4}), cell.legs[1]))
    with pytest.raises(UserError, match=r"memory-0\.json is of another config; give another --output"):
        run_cell(longer, start, [], tmp_path)


@pytest.mark.slow
def test_books_are_measured_with_and_without_training(tmp_path):
    held_out = tmp_path / "novel.txt"
    held_out.write_text("\n".join(f"Chapter {n}\n" + "the whale and the sea " * (9 + n) for n in (1, 2, 3)))
    window = ("model.window=12", "model.sinks=2", "model.max_distance=60")
    leg = tiny_config(
        "unused",
        *text_overrides(tmp_path / "train.txt", "segment"),
        *window,
        "model.vocab_size=258",
        "data.batch_size=8",
    )
    leg = replace(leg, train={"steps": 3, "curriculum": []}, eval={"every_steps": 0}, data={"segments_per_window": 2})
    start = random_checkpoint(tmp_path / "start", "memory.kind=none")
    run_base(start, Cell("books", "LoRA", 0, (leg,)), [str(held_out)], tmp_path)
    for name in ("LoRA", "memory and LoRA"):
        run_cell(Cell("books", name, 0, (leg,)), start, [str(held_out)], tmp_path)
    text = write_report(tmp_path)
    assert "| memory and LoRA | 0 |" in text and "+0.0000 ± 0.0000 (3 chapters)" in text  # two equal runs
    assert "| nothing | 0 | 0 |" in text
    assert_drawn(tmp_path / "books.png")
