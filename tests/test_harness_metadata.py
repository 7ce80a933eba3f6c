"""Tasks of the harness that build their texts get lengths and a tokenizer; what fails as they run is one message."""

import json
import sys

import pytest
import yaml
from evaluated import load, make_checkpoint, needs_harness

from lm2_jax.common.errors import UserError, run_command
from lm2_jax.config import dump_config, parse_config
from lm2_jax.evals import generation, harness
from lm2_jax.evaluate import main
from lm2_jax.loading import differences
from lm2_jax.parallel.mesh import use_mesh

SETTING = "eval.harness.metadata={max_seq_lengths: [512, 1024], nested: {a: [1.5, null]}}"

BUILD = """
import json
from pathlib import Path
from datasets import Dataset
from transformers import AutoTokenizer

def build(max_seq_lengths, tokenizer, note, **_):
    ids = AutoTokenizer.from_pretrained(tokenizer)("Mary went.", add_special_tokens=False).input_ids
    Path(note).write_text(json.dumps(ids))
    return {"test": Dataset.from_list([{"text": f"{length}"} for length in max_seq_lengths])}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models"), "none")


@pytest.fixture
def tasks(tmp_path):
    """Directory of a task that builds its texts, and of one with few examples."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "building.py").write_text(BUILD)
    asked = {"doc_to_text": "{{text}}", "doc_to_target": "x", "output_type": "generate_until", "test_split": "test"}
    asked |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 2}, "metric_list": [{"metric": "exact_match"}]}
    text = yaml.safe_dump({"task": "built", "dataset_path": "", **asked}) + "custom_dataset: !function building.build\n"
    (tmp_path / "tasks" / "built.yaml").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(5)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    few = {"task": "few", "fewshot_split": "test", **data, **asked}
    (tmp_path / "tasks" / "few.yaml").write_text(yaml.safe_dump(few))
    return tmp_path / "tasks"


def run(checkpoint, *overrides):
    loaded = load(checkpoint, *overrides)
    with use_mesh(loaded.mesh):
        return harness.evaluate(loaded, None, lambda _: None)


def test_a_mapping_is_a_setting_like_others():
    config = parse_config("", [SETTING, "eval.harness.metadata.max_seq_lengths=[256]"])
    assert config.eval.harness.metadata == {"max_seq_lengths": [256], "nested": {"a": [1.5, None]}}
    again = parse_config(dump_config(config))
    assert again == config and hash(again) == hash(config) != hash(parse_config("", [SETTING]))
    before, now = (parse_config("", overrides).model_dump() for overrides in ([], [SETTING]))
    for pair in ((before, now), (now, before)):
        assert [key for key, *_ in differences(*pair)] == ["eval.harness.metadata"]


@needs_harness
def test_tasks_get_lengths_and_the_models_tokenizer(tasks, checkpoint, tmp_path):
    metadata = f"{{max_seq_lengths: [3, 4, 5], note: {tmp_path / 'ids.json'}}}"
    result = run(checkpoint, f"eval.harness={{tasks: built, include: {tasks}, metadata: {metadata}}}")
    assert [(row["task"], row["samples"]) for row in result["scores"]] == [("built", 3)]
    assert json.loads((tmp_path / "ids.json").read_text()) == list(b"Mary went.")


@needs_harness
def test_what_fails_as_it_runs_is_one_message(tasks, checkpoint, monkeypatch, capsys):
    settings = f"eval.harness={{tasks: few, include: {tasks}, shots: 50}}"
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "--checkpoint", str(checkpoint), "--task", "harness", "--set", settings]
    )
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert "error: eval.harness: lm-evaluation-harness cannot run few (ValueError: " in message
    assert "Traceback" not in message


@needs_harness
def test_our_own_faults_keep_their_tracebacks(tasks, checkpoint, monkeypatch):
    def fault(*_, **__):
        return 1 / 0

    monkeypatch.setattr(generation, "generate_until", fault)
    with pytest.raises(ZeroDivisionError):
        run(checkpoint, f"eval.harness={{tasks: few, include: {tasks}, shots: 1}}")


# --- RULER ---------------------------------------------------------------------------------------------------------


@needs_harness
def test_variable_tracking_does_not_search_without_end(checkpoint):
    with pytest.raises(UserError, match=r"example of 500 tokens .* shortest has \d+ in this tokenizer"):
        run(checkpoint, "eval.harness={tasks: ruler_vt, metadata: {max_seq_lengths: [4096]}}")


@needs_harness
def test_a_needle_at_any_length(checkpoint):
    pytest.importorskip("wonderwords", reason="wonderwords is not installed (requirements-dev.txt)")
    settings = "eval.harness={tasks: niah_single_1, limit: 2, metadata: {max_seq_lengths: [1024]}}"
    assert [(row["metric"], row["samples"]) for row in run(checkpoint, settings)["scores"]] == [("1024", 2)]
