"""The card of an exported directory: a licence that is known or said to be missing, and what one needs to load it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from convert_helpers import convert, random_llama, random_own, with_keys
from helpers import quick_training, tiny_config

from lm2_jax.training.loop import train

CARD = """---
license: llama3.2
license_link: https://example.com/LICENSE
tags: [a, b]
base_model: someone/else
---
# A Llama
"""
EARLIER = Path(__file__).parent / "data" / "earlier" / "run"


def read(directory):
    """Front matter and text of a card."""
    assert (directory / "README.md").is_file(), "there is no model card"
    _, front, text = (directory / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def exported(ours, path):
    return convert("lm2_jax", "huggingface", ours, path)


def test_a_model_of_ours(tmp_path):
    path = exported(random_own(tmp_path / "ours"), tmp_path / "theirs")
    front, text = read(path)
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lm2"]}
    for said in ("No licence is stated.", "transformers>=5.4", "trust_remote_code=True", "segments of 16 tokens"):
        assert said in text
    assert "memory: lm2, 5 slots" in text
    assert json.loads((path / "config.json").read_text())["transformers_version"] == "5.4.0"


@pytest.mark.parametrize(("kind", "said"), [("rmt", "memory: rmt, 5 slots"), ("none", "memory: none\n")])
def test_other_memories(tmp_path, kind, said):
    ours = random_own(tmp_path / "ours", f"memory.kind={kind}")
    assert said in read(exported(ours, tmp_path / "theirs"))[1]


SINKS = "attention: a document's last 8 tokens and its first 2"


@pytest.mark.parametrize(
    ("overrides", "title", "said"),
    [
        (("memory.kind=none",), "# Mistral", "attention: a document's last 8 tokens\n"),
        (("memory.kind=none", "model.sinks=2"), "# LM2", f"{SINKS}\n"),
        (("model.sinks=2", "model.max_distance=1000"), "# LM2", f"{SINKS}, these no farther than 1,000 positions\n"),
    ],
)
def test_a_window(tmp_path, overrides, title, said):
    ours = random_own(tmp_path / "ours", "model.window=8", *overrides)
    _, text = read(exported(ours, tmp_path / "theirs"))
    assert f"{title}\n" in text and said in text
    assert ("linked by a memory" in text) == ("memory: lm2" in text)


def test_a_run_says_what_it_was_trained_on(tmp_path):
    _, text = read(exported(EARLIER, tmp_path / "theirs"))
    assert "trained for 4 steps on 256 tokens" in text


@pytest.mark.parametrize("memory", ["none", "lm2"])
def test_a_llama_keeps_its_licence(tmp_path, memory):
    random_llama(tmp_path / "llama")
    with_keys(_name_or_path="meta-llama/Llama-3.2-1B")(tmp_path / "llama")
    (tmp_path / "llama" / "README.md").write_text(CARD)
    ours = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours", f"memory.kind={memory}")
    front, text = read(exported(ours, tmp_path / "theirs"))
    assert (front["license"], front["license_link"]) == ("llama3.2", "https://example.com/LICENSE")
    assert front["base_model"] == "meta-llama/Llama-3.2-1B" and front["tags"] == ["lm2"]
    assert "`llama3.2`, as stated by the card" in text and "No licence" not in text
    assert ("transformers>=4.43" in text) == ("trust_remote_code" not in text) == (memory == "none")


@pytest.mark.parametrize("card", ["# no front matter", "---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: [a]\n---\n"])
def test_a_card_without_a_licence_invents_none(tmp_path, card):
    random_llama(tmp_path / "llama")
    (tmp_path / "llama" / "README.md").write_text(card)
    ours = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")
    front, text = read(exported(ours, tmp_path / "theirs"))
    assert "license" not in front and "No licence is stated." in text


def test_training_on_keeps_the_licence(tmp_path):
    """Of a run that started from a run that started from converted weights."""
    ours = shutil.copytree(EARLIER, tmp_path / "first")
    converted = convert("lm2_jax", "lm2_jax", ours, tmp_path / "converted")
    (converted / "origin").mkdir()
    (converted / "origin" / "README.md").write_text(CARD)
    base = ("train.curriculum=[]", "data.segments_per_window=1", "train.steps=2")
    with quick_training():
        for name, start in (("second", converted), ("third", tmp_path / "second")):
            train(tiny_config(tmp_path / name, *base, f"train.init_from={start}"))
    front, _ = read(exported(tmp_path / "third", tmp_path / "theirs"))
    assert (front["license"], front["base_model"]) == ("llama3.2", "someone/else")
