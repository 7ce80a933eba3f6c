"""Preparing data: every kind of input, damaged inputs, the command."""

import dataclasses
import gzip
import sys

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from prepare_helpers import (
    BYTES,
    TEXTS,
    WRITTEN,
    bin_shard,
    inputs_of,
    json_lines,
    parquet,
    settings_of,
    table,
    texts_in,
    write,
    zstd,
)

from lm2_jax import prepare_data, train_tokenizer
from lm2_jax.common.errors import UserError
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.documents import BinSource, JsonLinesSource, TextSource
from lm2_jax.data.prepare import inspection
from lm2_jax.data.prepare.chunks import Unreachable
from lm2_jax.data.prepare.inputs import HubInput
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import run_locally
from lm2_jax.data.prepared import PreparedSource, read_manifest, verify
from lm2_jax.tokenizer import find_tokenizer


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("lm2_jax.data.prepare.chunks.CHUNK_BYTES", 400)


# --- What goes in --------------------------------------------------------------------------------------------------

FILES = {
    "plain.jsonl": json_lines(TEXTS),
    "marked.ndjson": b"\xef\xbb\xbf" + json_lines(TEXTS) + b"\n\n",
    "packed.jsonl.gz": gzip.compress(json_lines(TEXTS)),
    "members.json.gz": gzip.compress(json_lines(TEXTS[:2])) + gzip.compress(json_lines(TEXTS[2:])),
    "packed.jsonl.zst": zstd(json_lines(TEXTS)),
    "frames.jsonl.zst": zstd(json_lines(TEXTS[:3])) + zstd(json_lines(TEXTS[3:])),
    "table.parquet": parquet(TEXTS),
    "large.parquet": parquet(TEXTS, kind=pyarrow.large_string()),
    "dictionary.parquet": parquet(pyarrow.array(TEXTS).dictionary_encode()),
    "view.parquet": parquet(TEXTS, kind=pyarrow.string_view()),
    "table.csv": table(TEXTS),
    "marked.CSV": b"\xef\xbb\xbf" + table(TEXTS) + b"\r\n\r\n",
    "table.tsv": table(TEXTS, "\t"),
    "packed.csv.gz": gzip.compress(table(TEXTS)),
    "packed.tsv.zst": zstd(table(TEXTS, "\t")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(tmp_path, name):
    path = write(tmp_path / name, FILES[name])
    manifest = prepare(inputs_of([path]), settings_of(tmp_path / "out"), run_locally(1))
    assert texts_in(tmp_path / "out") == WRITTEN
    assert (manifest.documents, manifest.skipped) == (len(WRITTEN), 0)
    assert manifest.empty == 2
    (source,) = manifest.sources
    assert source["name"] == str(path) and source["bytes"] == path.stat().st_size


def test_documents_are_those_that_training_reads_from_the_files(tmp_path):
    text = write(tmp_path / "a.txt", "\ufeffChapter 1\nx\nChapter 2\n\u00e9 y\n".encode())
    packed = write(tmp_path / "b.txt.gz", gzip.compress(b"\nz\nChapter 3\n"))
    lines = write(tmp_path / "c.jsonl", json_lines(TEXTS))
    prepare(inputs_of([tmp_path / "*.*"], separator="^Chapter"), settings_of(tmp_path / "out"), run_locally(1))
    plain = write(tmp_path / "b.txt", gzip.decompress(packed.read_bytes()))
    expected = [*TextSource([text, plain], BYTES, "^Chapter"), *JsonLinesSource([lines], BYTES)]
    prepared = PreparedSource([tmp_path / "out"])
    assert len(prepared) == len(expected) == 9
    for document, other, length in zip(prepared, expected, prepared.lengths, strict=True):
        np.testing.assert_array_equal(document.tokens, other.tokens)
        assert document.tokens.dtype == other.tokens.dtype == np.int32
        assert document.text_bytes == other.text_bytes and length == len(other.tokens)
        assert not document.answers.any() and len(document.answers) == length


def test_another_field(tmp_path):
    path = write(tmp_path / "x.jsonl", json_lines(["a"], key="content"))
    columns = write(tmp_path / "y.parquet", parquet(["b"], column="content"))
    rows = write(tmp_path / "z.csv", table(["c, d"], column="content"))
    prepare(inputs_of([path, columns, rows], field="content"), settings_of(tmp_path / "out"), run_locally(1))
    assert texts_in(tmp_path / "out") == ["a", "b", "c, d"]


def test_a_long_text_in_a_table(tmp_path):
    """Python's csv stops at 131,072 characters unless it is told otherwise."""
    path = write(tmp_path / "x.csv", table(["a, b\n" * 50_000, "c"]))
    prepare(inputs_of([path]), settings_of(tmp_path / "out"), run_locally(1))
    assert texts_in(tmp_path / "out") == ["a, b\n" * 50_000, "c"]


@pytest.mark.parametrize("name", ["x.xml", "x.html.gz", "x.csv.bz2", "x.arrow", "x.tab"])
def test_unknown_endings_are_refused(tmp_path, name):
    path = write(tmp_path / name, b"<p>text</p>")
    with pytest.raises(UserError, match=rf"{name}: files that end in \.\w+ are not read; give text"):
        inputs_of([path])


def test_tokenizers_are_trained_on_text(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", json_lines(TEXTS))
    monkeypatch.setattr(
        sys, "argv", ["train", "--input", str(path), "--output", str(tmp_path / "t"), "--vocab-size=300"]
    )
    with pytest.raises(UserError, match=r"x\.jsonl is not plain text by its ending"):
        train_tokenizer.main()


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.TXT", "x.py", "wiki_00", "x.rst.gz"])
def test_endings_of_text(tmp_path, name):
    path = write(tmp_path / name, gzip.compress(b"a,b") if name.endswith(".gz") else b"a,b")
    prepare(inputs_of([path]), settings_of(tmp_path / "out"), run_locally(1))
    assert texts_in(tmp_path / "out") == ["a,b"]


def test_official_shards_in_and_out(tmp_path):
    path = write(tmp_path / "x.bin", bin_shard("abc", "", "d"))
    prepare(inputs_of([path]), settings_of(tmp_path / "out"), run_locally(1))
    assert [document.tokens.tolist() for document in PreparedSource([tmp_path / "out"])] == [
        [256, 97, 98, 99],
        [256],
        [256, 100],
    ]
    lines = write(tmp_path / "x.jsonl", json_lines(["abc", "d" * 50, "e"]))
    prepare(inputs_of([lines]), settings_of(tmp_path / "bin", format="bin", shard_bytes=10), run_locally(1))
    assert (tmp_path / "bin" / "corpus_val_000000.bin").read_bytes() == bin_shard("abc", "d" * 50, "e")
    assert len(BinSource([tmp_path / "bin" / "*.bin"], 258, 256)) == 3
    verify(tmp_path / "bin", read_manifest(tmp_path / "bin"))
    shard = bytearray((tmp_path / "bin" / "corpus_val_000000.bin").read_bytes())
    shard[1030] ^= 1
    write(tmp_path / "bin" / "corpus_val_000000.bin", shard)
    with pytest.raises(UserError, match=r"corpus_val_000000.bin: is damaged \(its SHA-256 is not the manifest's\)"):
        verify(tmp_path / "bin", read_manifest(tmp_path / "bin"))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    def load_dataset(repository, config, *, split, revision, streaming):
        assert (repository, config, split, revision, streaming) == ("owner/corpus", "small", "train", "abc", True)
        return datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))}).to_iterable_dataset()

    class Hub:
        def dataset_info(self, repository, revision):
            if repository != "owner/corpus" or revision not in (None, "abc", "refs/pr/1"):
                raise ValueError("404\nlong text")
            return type("Info", (), {"sha": "abc"})()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    manifest = prepare(inputs_of(["owner/corpus:small"]), settings_of(tmp_path / "out"), run_locally(1))
    assert texts_in(tmp_path / "out") == WRITTEN
    assert manifest.sources == ({"name": "owner/corpus:small", "split": "train", "revision": "abc"},)
    for revision in ("abc", "refs/pr/1"):
        assert inputs_of([f"owner/corpus@{revision}:small"]) == inputs_of(["owner/corpus:small"])
    with pytest.raises(UserError, match=r"owner/corpus@def is no file, and"):
        inputs_of(["owner/corpus@def"])
    with pytest.raises(UserError, match=r"owner/none is no file, and no data set .* \(ValueError: 404\)"):
        inputs_of(["owner/none"])
    with pytest.raises(UserError, match=r"owner/corpus:small: has no column 'content'; its columns are text, id"):
        inputs = inputs_of(["owner/corpus:small"], field="content")
        prepare(inputs, settings_of(tmp_path / "none", field="content"), run_locally(1))
    with pytest.raises(UserError, match=r"owner/corpus:small: row 1: 'id' holds int; expected strings"):
        inputs = inputs_of(["owner/corpus:small"], field="id")
        prepare(inputs, settings_of(tmp_path / "numbers", field="id"), run_locally(1))


class Dropped(Exception):
    """As a library of the network's may raise."""


@pytest.mark.parametrize("failure", [Dropped("no route"), ConnectionError("no route"), TimeoutError("no route")])
def test_a_hub_that_cannot_be_reached_costs_no_document(tmp_path, monkeypatch, failure):
    """Whatever --on-error says: the run ends, and the next one goes on."""
    reachable = 3

    def rows():
        for number, text in enumerate(TEXTS):
            if number == reachable:
                raise failure
            yield {"text": text}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    source = HubInput("owner/corpus", None, "train", "text", "abc")
    settings = settings_of(tmp_path / "out", on_error="skip", shard_bytes=5)
    monkeypatch.setattr("lm2_jax.data.prepare.chunks.CHUNK_BYTES", 4)
    with pytest.raises(
        Unreachable, match=r"owner/corpus: the hub sends no more rows \(\w+: no route\); the same comma"
    ):
        prepare([source], settings, run_locally(1))
    reachable = len(TEXTS)
    assert prepare([source], settings, run_locally(1)).skipped == 0
    assert texts_in(tmp_path / "out") == WRITTEN


@pytest.mark.parametrize(("name", "module"), [("x.parquet", "pyarrow.parquet"), ("x.txt.zst", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install pyarrow"):
        inputs_of([write(tmp_path / name, b"")])


def test_tokenizers_by_name(tmp_path, monkeypatch):
    assert find_tokenizer("bytes") == TokenizerConfig(kind="bytes")
    file = write(tmp_path / "tokenizer.json", b'{"model": 1}')
    assert find_tokenizer(str(file)) == TokenizerConfig(kind="tokenizers", path=str(file))
    asked = []

    def download(repository, name):
        asked.append(name)
        if repository != "a/b":
            raise ConnectionError("no network")
        if name not in ("tokenizer.json", "generation_config.json"):
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return file.with_name(name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_tokenizer("a/b").path == str(file)
    assert "generation_config.json" in asked
    with pytest.raises(UserError, match=r"--tokenizer: c/d is not a file, and the hub has no such tokenizer\.json"):
        find_tokenizer("c/d")
    with pytest.raises(UserError, match=r"is neither a tokenizer\.json nor a sentencepiece model nor a Llama-3"):
        find_tokenizer(str(write(tmp_path / "odd", b"odd")))
    with pytest.raises(UserError, match="--tokenizer: nothing cannot be read"):
        find_tokenizer("nothing")


# --- Damaged inputs ------------------------------------------------------------------------------------------------

GOOD = json_lines(["a", "b"])
LONG = json_lines([np.random.default_rng(number).bytes(500).hex() for number in range(600)])
DAMAGED = {
    "a broken line": ("x.jsonl", GOOD + b'{"text": "c\n' + GOOD, r"x.jsonl: line 3: not JSON \(Invalid", 4),
    "a line without an end": ("x.jsonl", GOOD + b" " * (40 << 20) + b"\n" + GOOD, r"line 3: is longer than 33,55", 4),
    "no object": ("x.jsonl", GOOD + b"3\n", r"x.jsonl: line 3: holds int; expected an object", 2),
    "a missing field": ("x.jsonl", GOOD + b'{"body": ""}\n', r"line 3: has no 'text'; its keys are 'body'", 2),
    "no string": ("x.jsonl", GOOD + b'{"text": null}\n', r"line 3: 'text' is NoneType; expected a string", 2),
    "half a surrogate pair": ("x.jsonl", b'{"text": "\\ud800"}\n' + GOOD, r"line 1: 'text' holds half a surr", 2),
    "bad UTF-8": (
        "x.jsonl.gz",
        gzip.compress(GOOD + b'{"text": "\xff"}\n'),
        r"line 3: not UTF-8 text, byte 10 is 0x",
        2,
    ),
    "bad UTF-8 text": ("x.txt", b"abc\xff", r"x.txt: not UTF-8 text, byte 3 is 0xff", None),
    "a truncated gzip": ("x.jsonl.gz", gzip.compress(LONG)[:-90], r"x.jsonl.gz: line \d+: .*is cut short", ...),
    "no gzip": ("x.jsonl.gz", GOOD, r"x.jsonl.gz: line 1: cannot be read \(Not a gzipped file", None),
    "a truncated zstd": (
        "x.jsonl.zst",
        zstd(LONG)[:-20],
        r"x.jsonl.zst: line \d+: cannot be read \(Truncated",
        ...,
    ),
    "no zstd": ("x.jsonl.zst", GOOD, r"x.jsonl.zst: line 1: cannot be read", None),
    "a truncated parquet": ("x.parquet", parquet(TEXTS)[:-9], r"x.parquet: cannot be read \(Parquet magic", None),
    "no such column": ("x.parquet", parquet(TEXTS, "body"), r"x.parquet: has no column 'text'; its .* id, body", None),
    "a column of numbers": ("x.parquet", parquet([1], kind=pyarrow.int64()), r"column 'text' holds int64; exp", None),
    "a null": ("x.parquet", parquet(["a", None, "b"]), r"x.parquet: row 2: 'text' is null; expected a string", 2),
    "no such column in a table": (
        "x.csv",
        table(["a"], column="body"),
        r"x.csv: has no column 'text'; its .*body",
        None,
    ),
    "two such columns": ("x.csv", b"text,text\na,b\n", r"x.csv: has two columns 'text'", None),
    "a comma without quotes": ("x.csv", b"text,id\na,1\nb, c,2\nd,3\n", r"x.csv: row 2: has more or fewer columns", 2),
    "a quote that never ends": ("x.csv", b'text\na\n"b\nc\n', r"x.csv: row 2: cannot be read \(unexpected end", 1),
    "a table in Latin-1": (
        "x.csv",
        "text\ncaf\u00e9\n".encode("latin-1"),
        r"x.csv: line 2: not UTF-8 text, byte 3",
        None,
    ),
    "numbers in a list": ("x.parquet", parquet([["a"]]), r"column 'text' holds list<.*; exp", None),
    "an official shard cut short": ("x.bin", bin_shard("abc")[:-2], r"x.bin: .*the file is cut short", None),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_inputs(tmp_path, case):
    """Stopped at, or skipped and counted: `kept` documents are left (... some, None the file is lost)."""
    name, data, message, kept = DAMAGED[case]
    path, other = write(tmp_path / name, data), write(tmp_path / "y.jsonl", json_lines(["other"]))
    settings = settings_of(tmp_path / "out")
    with pytest.raises(
        UserError, match=rf"{message}[^$]*\ncall again with --on-error skip to leave out such documents"
    ):
        prepare(inputs_of([path, other]), settings, run_locally(1))
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepare(inputs_of([path, other]), dataclasses.replace(settings, on_error="skip"), run_locally(1))
    assert manifest.skipped == 1
    assert len(manifest.problems) == 1
    texts = texts_in(tmp_path / "out")
    assert texts[-1] == "other"
    assert 400 < len(texts) < 601 if kept is ... else len(texts) == 1 + (kept or 0)


def test_nothing_left_is_an_error(tmp_path):
    path = write(tmp_path / "x.jsonl", b"{\n")
    with pytest.raises(UserError, match=r"--input: no document is left\n.*line 1: not JSON"):
        prepare(inputs_of([path]), settings_of(tmp_path / "out", on_error="skip"), run_locally(1))


# --- The command ---------------------------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    prepare_data.main()


def test_command_and_inspection(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "x.jsonl", json_lines(TEXTS) + b"{\n")
    arguments = ("--input", path, "--output", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1)
    with pytest.raises(UserError, match="line 8: not JSON"):
        command(monkeypatch, *arguments)
    command(monkeypatch, *arguments, "--on-error", "skip")
    said = capsys.readouterr().out
    assert "5 documents, " in said and "left out: 2 empty, 1 damaged" in said
    assert "line 8: not JSON" in said
    command(monkeypatch, "--inspect", tmp_path / "out")
    said = capsys.readouterr().out
    assert "document 0, 5 tokens: 'one'" in said and "document 4, 6 tokens: 'five'" in said
    assert "share of padding" in said
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_lengths_counts_every_document():
    (axes,) = inspection.plot_lengths(np.array([0, 3, 5, 5, 300])).axes
    assert sum(bar.get_height() for bar in axes.patches) == 5
    assert (axes.get_xscale(), axes.get_title()) == ("log", "5 documents")


def test_padding_share():
    lengths = np.array([1, 2, 34, 66])  # 0, 1, 33 and 65 positions: 1 + 2 + 3 segments of 32
    table = inspection.padding_table(lengths)
    assert next(iter(table.columns[1].cells)) == f"{1 - 99 / 192:.1%}"


def test_the_command_says_everything_that_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        command(monkeypatch, "--input", "x", "--workers", 0, "--shard-mb", 0, "--document-separator", "(")
    assert [line.split(" ")[0] for line in str(error.value).split("\n")] == [
        "--output",
        "--tokenizer",
        "--workers:",
        "--shard-mb:",
        "--document-separator",
    ]
