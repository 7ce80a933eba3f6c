"""The benchmark compares what its titles say, and writes what it measured."""

import json
import re
import sys

import pytest
from helpers import TINY

from lm2_jax import bench
from lm2_jax.common.errors import UserError
from lm2_jax.compiled import peers, timing
from lm2_jax.compiled.comparisons import comparisons
from lm2_jax.config import SHIPPED, load_config, parse_config
from lm2_jax.model.sizes import parameters

SMALL = ("model.vocab_size=32", "data.batch_size=8", "train.curriculum=[]", "mesh.data=-1", "mesh.fsdp=1")


def run(monkeypatch, tmp_path, *arguments):
    (tmp_path / "config.yaml").write_text(TINY)
    overrides = [part for key in SMALL for part in ("--set", key)]
    monkeypatch.setattr(sys, "argv", ["bench", "--config", str(tmp_path / "config.yaml"), *overrides, *arguments])
    bench.main()


def test_comparisons_are_at_equal_parameters_and_equal_tokens():
    by_title = {comparison.title: comparison for comparison in comparisons(parse_config(TINY, SMALL))}
    kinds = by_title["Training, by kind of memory (equal parameters, equal tokens)"].variants
    assert list(kinds) == ["none", "lm2", "rmt"]
    counts = [parameters(config) for config in kinds.values()]
    assert max(counts) - min(counts) <= 3 * kinds["lm2"].model.d_model
    assert len({(c.stages[-1].segments, c.stages[-1].segment_length, c.data.batch_size) for c in kinds.values()}) == 1
    contexts = by_title["Training, by context: segments with memory, and full attention"].variants
    assert [c.stages[-1].segments * c.stages[-1].segment_length for c in contexts.values()] == [32, 64, 128] * 2
    assert {c.stages[-1].segments for name, c in contexts.items() if name.startswith("none")} == {1}


@pytest.mark.parametrize(
    ("title", "names"), [("schedule", ["segment", "layer"]), ("Decoding a segment, by s", ["N 4", "N 8", "N 16"])]
)
def test_what_is_measured_is_written_and_shown(monkeypatch, tmp_path, capsys, title, names):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    run(monkeypatch, tmp_path, "--only", title, "--rounds", "2", "--output", str(tmp_path / "bench.json"))
    (rows,) = json.loads((tmp_path / "bench.json").read_text())["races"].values()
    assert [row["name"] for row in rows] == names
    assert rows[0]["time_per_token_ratio"] == 1
    shown = capsys.readouterr().out
    for row in rows:
        assert 0 < row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
        assert row["ratio_range"][0] <= row["time_per_token_ratio"] <= row["ratio_range"][1]
        assert re.search(rf"│ {row['name']} +│ +{row['parameters']:,} │", shown)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plain_llama_of_any_config_is_raced(path):
    peers._with_context(peers.plain_llama(load_config(path, ["model.vocab_size=96"])), 8, 512)


def test_both_are_the_same_llama():
    """As many parameters, whatever ours has besides."""
    extra = ("model.conv_width=4", "model.lora={rank: 2}", "model.window=8", "model.num_heads=4", "model.vocab_size=96")
    config = peers.plain_llama(parse_config(TINY, ["train.curriculum=[]", *extra]))
    _, theirs, _ = peers._their_model("sdpa", config)
    assert parameters(config) == sum(weight.numel() for weight in theirs.parameters())


@pytest.mark.parametrize("title", ["Prefill, 2 x 16", "Decoding, 2 x 16"])
def test_transformers_is_raced(monkeypatch, tmp_path, title):
    """In the same run, by tokens a second, with each of its implementations of attention."""
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(peers, "CONTEXTS", (16,))
    monkeypatch.setattr(peers, "BATCHES", (2,))
    output = tmp_path / "bench.json"
    run(monkeypatch, tmp_path, "--against", "transformers", "--only", title, "--rounds", "2", "--output", str(output))
    (rows,) = json.loads(output.read_text())["races"].values()
    assert [row["name"] for row in rows] == ["lm2_jax", "transformers, sdpa", "transformers, eager"]
    assert all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds: found 0"),
        (("--only", "nothing like it"), "--only: found 'nothing like it'"),
        (("--set", "memory.kind=none"), "memory.kind: found none"),
        (("--output", "nowhere/at/all.json"), "--output: found nowhere"),
    ],
)
def test_errors_name_the_flag(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tmp_path, *arguments)
