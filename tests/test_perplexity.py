"""Perplexity, against documents read by themselves, one segment after the other, and against transformers."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import on_one_device, random_checkpoint

from lm2_jax.common.errors import UserError, run_command
from lm2_jax.evals import perplexity
from lm2_jax.evals.model import load_for_evaluation
from lm2_jax.evaluate import main
from lm2_jax.parallel.mesh import use_mesh
from lm2_jax.segments import run_segments

T = 16
WORDS = ("the", "memory", "slots", "keep", "what", "a", "segment", "said", "and", "forget", "née")
SETTINGS = ("data.batch_size=8", f"data.segment_length={T}", "data.segments_per_window=2")


def texts():
    """Shorter and longer than a segment and than a window, more than there are lanes."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, n)) for n in (1, 2, 3, 30, 6, 5, 12, 8, 1, 21, 2, 4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts()):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(texts())]
    (folder / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("lm2") / "model", *SETTINGS)


def measure(checkpoint, *overrides, output=None):
    loaded = load_for_evaluation(checkpoint, overrides)
    with use_mesh(loaded.mesh):
        return perplexity.evaluate(loaded, output, lambda _: None)


def by_hand(checkpoint, documents):
    """Nats of every target of each document, alone in its row, from its first segment to the last."""
    loaded = load_for_evaluation(checkpoint)
    model, params = loaded.model, loaded.params
    lengths = [len(tokens) - 1 for tokens in documents]
    tokens_BP = np.zeros((len(documents), -(-max(lengths) // T) * T), np.int32)
    targets_BP = np.zeros_like(tokens_BP)
    for row, (tokens, length) in enumerate(zip(documents, lengths, strict=True)):
        tokens_BP[row, :length], targets_BP[row, :length] = tokens[:-1], tokens[1:]

    @jax.jit
    def read(params):
        memory = model.init_memory(len(documents), params)
        logits_BSTV, _ = run_segments(model, params, tokens_BP.reshape(len(documents), -1, T), memory)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BSTV.reshape(*tokens_BP.shape, -1), targets_BP)

    return [loss_P[:length] for loss_P, length in zip(np.asarray(read(params)), lengths, strict=True)]


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_equals_documents_read_by_hand(kind, files, tmp_path):
    checkpoint = random_checkpoint(tmp_path / "model", *SETTINGS, f"memory.kind={kind}")
    with on_one_device():
        result = measure(checkpoint, f"eval.perplexity.path={files}/*.txt")
        losses = by_hand(checkpoint, [[256, *text.encode(), 257] for text in texts()])
    every = np.concatenate(losses)
    assert (result["documents"], result["tokens"]) == (len(losses), len(every))
    assert result["nats_per_token"] == pytest.approx(every.mean(), abs=1e-4)
    assert result["perplexity"] == pytest.approx(np.exp(every.mean()), rel=1e-4)
    num_bytes = sum(len(text.encode()) for text in texts())
    assert result["bytes"] == num_bytes
    assert result["bits_per_byte"] == pytest.approx(every.sum() / np.log(2) / num_bytes, abs=1e-4)

    position = np.concatenate([np.arange(len(loss)) for loss in losses])
    assert len(result["by_segment"]) == max(position) // T + 1 > 6
    for row in result["by_segment"]:
        here = position // T == row["segment"]
        assert row["tokens"] == here.sum()
        assert row["nats_per_token"] == pytest.approx(every[here].mean(), abs=1e-4)
    groups = [(row["from"], row["to"]) for row in result["by_distance"]]
    assert groups == [(1, 16), (17, 32), (33, 64), (65, 128), (129, max(position) + 1)]
    for row in result["by_distance"]:
        here = (row["from"] <= position + 1) & (position + 1 <= row["to"])
        assert row["tokens"] == here.sum()
        assert row["nats_per_token"] == pytest.approx(every[here].mean(), abs=1e-4)


def test_json_lines_windows_lanes_and_devices_change_nothing(files, checkpoint):
    with on_one_device():
        expected = measure(checkpoint, f"eval.perplexity.path={files}/*.txt")
        other = measure(
            checkpoint, f"eval.perplexity.path={files}/all.jsonl", "data.batch_size=3", "data.segments_per_window=3"
        )
    sharded = measure(checkpoint, f"eval.perplexity.path={files}/*.txt")  # over eight devices
    for result in (other, sharded):
        assert result.keys() == expected.keys()
        for key in ("nats_per_token", "bits_per_byte", "documents", "tokens"):
            assert result[key] == pytest.approx(expected[key], rel=1e-5)
        for row, right in zip(result["by_segment"], expected["by_segment"], strict=True):
            assert row == pytest.approx(right, rel=1e-5)


def test_equals_transformers(tmp_path):
    """A converted Llama on documents of one segment, as .bin shards."""
    torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
    pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")
    from convert_helpers import V, convert, random_llama
    from test_errors import write_shard

    llama = random_llama(tmp_path / "llama")
    ours = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours", "data.segment_length=64")
    rng = np.random.default_rng(0)
    documents = [[0, *rng.integers(1, V, n).tolist()] for n in (5, 64, 1, 30, 63, 17, 40, 50, 9, 33)]
    write_shard(tmp_path / "tokens.bin", [token for document in documents for token in document])
    settings = ("data.begin_id=0", "data.batch_size=4")
    with on_one_device():
        result = measure(ours, f"eval.perplexity.path={tmp_path}/tokens.bin", *settings)
    with torch.no_grad():
        logits = [llama(torch.tensor([document])).logits[0, :-1] for document in documents]
    losses = [
        torch.nn.functional.cross_entropy(x, torch.tensor(document[1:]), reduction="none").numpy()
        for x, document in zip(logits, documents, strict=True)
    ]
    assert result["by_segment"] == [{"segment": 0, "tokens": 312, "nats_per_token": result["nats_per_token"]}]
    assert result["nats_per_token"] == pytest.approx(np.concatenate(losses).mean(), abs=1e-4)
    assert result["bytes"] is result["bits_per_byte"] is None


def test_held_out_documents_by_default(files, tmp_path):
    """Without a path the run's own validation documents."""
    where = ("data.source=text", f"data.path={files}/*.txt", "data.validation_fraction=0.3")
    with on_one_device():
        result = measure(random_checkpoint(tmp_path / "model", *SETTINGS, *where))
    assert result["documents"] == 4


def test_finished_documents_are_not_read_again(files, checkpoint, tmp_path, monkeypatch):
    path, output = f"eval.perplexity.path={files}/*.txt", tmp_path / "result.json"
    finished = tmp_path / "result.finished.jsonl"
    with on_one_device():
        expected = measure(checkpoint, path, output=output)
        lines = finished.read_text().splitlines(keepends=True)
        assert len(lines) == 1 + len(texts())
        finished.write_text("".join(lines[:7]) + lines[7][:20])  # killed in the middle of a line
        result = measure(checkpoint, path, output=output)
        assert result["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-6)
        assert finished.read_text().splitlines(keepends=True)[:7] == lines[:7]
        monkeypatch.setattr(perplexity, "run_batch", None)
        assert measure(checkpoint, path, output=output) == result
        with pytest.raises(UserError, match=r"samples of another evaluation \(files"):
            measure(checkpoint, f"eval.perplexity.path={files}/0*.txt", output=output)


def test_finished_documents_of_other_contents(checkpoint, tmp_path):
    """A file of the same name and size; records of an earlier version, which knew no more than these, are kept."""
    text, output = tmp_path / "text.txt", tmp_path / "result.json"
    finished = tmp_path / "result.finished.jsonl"
    text.write_text("one text")
    with on_one_device():
        expected = measure(checkpoint, f"eval.perplexity.path={text}", output=output)
        text.write_text("two text")
        with pytest.raises(UserError, match=r"samples of another evaluation \(contents"):
            measure(checkpoint, f"eval.perplexity.path={text}", output=output)
        head, *records = finished.read_text().splitlines()
        earlier = {key: value for key, value in json.loads(head).items() if key != "contents"}
        finished.write_text("\n".join([json.dumps(earlier), *records, ""]))
        assert measure(checkpoint, f"eval.perplexity.path={text}", output=output) == expected


def test_command(files, checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    command = ["evaluate", "--checkpoint", str(checkpoint), "--task", "perplexity", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--set", f"eval.perplexity.path={files}/*.txt"])
    with on_one_device():
        run_command(main)
    result, said = json.loads(output.read_text()), capsys.readouterr().out
    assert f"{result['nats_per_token']:.4f}" in said and "12/12 documents" in said
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "eval.perplexity.path is missing: name text files"),
        (("eval.perplexity.path=nowhere.txt",), "eval.perplexity.path: nowhere.txt does not exist"),
        (("eval.perplexity.path=empty.txt",), "eval.perplexity.path: no documents; all files are empty"),
        (("eval.perplexity.path=latin.txt",), "latin.txt: not UTF-8 text"),
        (("eval.perplexity.path=bad.jsonl",), "bad.jsonl: line 1: has no 'text'; its keys are 'content'"),
        (("eval.perplexity.path=bad.ndjson",), "bad.ndjson: line 1: has no 'text'; its keys are 'content'"),
        (("eval.perplexity.path=table.csv",), "table.csv is neither text (.txt), .jsonl nor .bin by its ending; set"),
        (("eval.perplexity.path=[latin.txt, bad.jsonl]",), "files of several kinds (jsonl, text)"),
        (("eval.perplexity.path=empty.txt", "model.d_model=32"), "the checkpoint's model cannot be set"),
        (("eval.perplexity={path: empty.txt, document_separator: '('}",), "is not a regular expression"),
        (("eval.perplexity.paths=empty.txt",), "unknown key; did you mean 'path'?"),
        (("data.batch_size=7", "eval.perplexity.path=latin.txt"), "7 lanes do not divide"),
    ],
)
def test_errors(overrides, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes(b"n\xe9e")
    for name in ("bad.jsonl", "bad.ndjson"):
        Path(name).write_text('{"content": "text"}\n')
    Path("table.csv").write_text("text\nOne.\n")
    arguments = [argument for override in overrides for argument in ("--set", override)]
    fails(monkeypatch, capsys, said, "--checkpoint", str(checkpoint), *arguments)


def fails(monkeypatch, capsys, said, *arguments, task="perplexity"):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--task", task, *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith("error: ") and said in message and "Traceback" not in message


def test_output_is_checked_first(monkeypatch, capsys):
    for output in ("result.txt", "no/such/directory/result.json"):
        fails(monkeypatch, capsys, "give a file that ends in .json", "--checkpoint", "x", "--output", output)


def test_one_of_several_processes(checkpoint, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="evaluation runs in one process, over all of its devices; this is one of 4"):
        load_for_evaluation(checkpoint)


def test_what_looks_ahead_is_refused(tmp_path):
    sizes = ("memory={kind: official, num_slots: 16, num_heads: 2}", "data.segment_length=16")
    checkpoint = random_checkpoint(tmp_path / "model", *sizes, "data.batch_size=8")
    with pytest.raises(UserError, match="look ahead"):
        measure(checkpoint, "eval.perplexity.path=a.txt")


def test_the_generators_words_are_no_text(tmp_path):
    checkpoint = random_checkpoint(
        tmp_path / "model", "tokenizer.kind=stories", "model.vocab_size=185", "data.batch_size=8"
    )
    (tmp_path / "a.txt").write_text("Call me Ishmael.")
    with pytest.raises(UserError, match="knows only the generator's words"):
        measure(checkpoint, f"eval.perplexity.path={tmp_path}/a.txt")
