"""Preparing data: every kind of input, the same output however it is made, kills, damaged inputs, the command."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import prepare_data
import pyarrow
import pyarrow.parquet
import pytest
from helpers import interruptible

from lm2_jax.common.errors import UserError
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.documents import BinSource, JsonLinesSource, TextSource
from lm2_jax.data.prepare import workers
from lm2_jax.data.prepare.chunks import Unreachable
from lm2_jax.data.prepare.files import TextInput
from lm2_jax.data.prepare.inputs import open_inputs
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import Settings, group_inputs
from lm2_jax.data.prepare.tables import HubInput
from lm2_jax.data.prepare.workers import run_locally
from lm2_jax.data.prepared import PreparedSource, read_manifest, verify
from lm2_jax.tokenizer import BytesTokenizer, find_tokenizer

ROOT = Path(__file__).parents[1]
BYTES = BytesTokenizer()
TEXTS = ["one", "two \u00e9\u65e5", "  ", "three\nlines\nlong", "", "four " * 40, "five"]
WRITTEN = [text for text in TEXTS if text.strip()]


def inputs_of(names, **changes):
    options = {"field": "text", "separator": None, "split": "train", "vocab_size": 258, "bos_id": 256} | changes
    return open_inputs([str(name) for name in names], **options)


def settings_of(output, **changes):
    return Settings(**{"tokenizer": TokenizerConfig(kind="bytes"), "output": output} | changes)


def texts_in(output):
    return [BYTES.decode(document.tokens) for document in PreparedSource([output], BYTES.fingerprint())]


def files_in(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def json_lines(texts, key="text"):
    return "".join(json.dumps({"id": 7, key: text}) + "\n" for text in texts).encode()


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(texts, column="text", kind=None):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, kind)})
    pyarrow.parquet.write_table(table, sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def bin_shard(*documents):
    ids = np.concatenate([[256, *text.encode()] for text in documents]).astype("<u4")
    return np.array([20240801, 7, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes()


def write(path, data):
    path.write_bytes(data)
    return path


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
    table = write(tmp_path / "y.parquet", parquet(["b"], column="content"))
    prepare(inputs_of([path, table], field="content"), settings_of(tmp_path / "out"), run_locally(1))
    assert texts_in(tmp_path / "out") == ["a", "b"]


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
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *asked: {("a/b", "tokenizer.json"): file}[asked])
    assert find_tokenizer("a/b").path == str(file)
    with pytest.raises(UserError, match=r"--tokenizer: c/d is not a file, and the hub has no such tokenizer\.json"):
        find_tokenizer("c/d")
    with pytest.raises(UserError, match=r"is neither a tokenizer\.json nor a sentencepiece model nor a Llama-3"):
        find_tokenizer(str(write(tmp_path / "odd", b"odd")))
    with pytest.raises(UserError, match="--tokenizer: nothing cannot be read"):
        find_tokenizer("nothing")


# --- The same output, however it is made ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files that make several groups and shards of a kilobyte or two, and what they become."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(3):
        texts = ["w" * int(n) for n in rng.integers(0, 300, 8)]
        data = json_lines(texts)
        write(directory / f"{number}.jsonl{'.gz' if number % 2 else ''}", gzip.compress(data) if number % 2 else data)
    write(directory / "broken.jsonl", json_lines(["fine"]) + b"{\n")
    return directory


SMALL = {"shard_bytes": 1500, "on_error": "skip"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("lm2_jax.data.prepare.chunks.CHUNK_BYTES", 400)


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("lm2_jax.data.prepare.chunks.CHUNK_BYTES", 400)
        manifest = prepare(inputs_of([corpus / "*"]), settings_of(output, **SMALL), run_locally(1))
    assert len(manifest.shards) > 3 and len(manifest.sources) == 4
    return files_in(output)


def test_any_number_of_workers(corpus, prepared, tmp_path):
    prepare(inputs_of([corpus / "*"]), settings_of(tmp_path, **SMALL), run_locally(3))
    assert files_in(tmp_path) == prepared


def test_on_beam(corpus, prepared, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed")
    from lm2_jax.data.prepare.beam import run_on_beam

    prepare(inputs_of([corpus / "*"]), settings_of(tmp_path, **SMALL), run_on_beam())
    assert files_in(tmp_path) == prepared


class Killed(BaseException):
    """Ends a process at a chosen moment, for tests within this one."""


def test_killed_at_every_step(corpus, prepared, tmp_path, monkeypatch):
    """Stopped before each file that is put in its place, and at some chunks, then gone on with."""
    left = 0

    def perhaps():
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    replace, run_task = Path.replace, workers.run_task
    monkeypatch.setattr(Path, "replace", lambda self, target: (perhaps(), replace(self, target))[1])
    monkeypatch.setattr(workers, "run_task", lambda *arguments: (perhaps(), run_task(*arguments))[1])
    kills = 0
    while True:
        left, output = kills + 1, tmp_path / str(kills)
        try:
            prepare(inputs_of([corpus / "*"]), settings_of(output, **SMALL), run_locally(1))
            break
        except Killed:
            kills += 1
        left = 0
        if not (output / "manifest.json").exists():
            with pytest.raises(UserError, match=r"has no manifest\.json"):
                PreparedSource([output])
        prepare(inputs_of([corpus / "*"]), settings_of(output, **SMALL), run_locally(1))
        assert files_in(output) == prepared, kills
    assert kills > 25


def test_killed_processes(corpus, prepared, tmp_path):
    """SIGKILL to the command with two workers; none of them stays behind."""
    output = tmp_path / "out"
    program = "import lm2_jax.data.prepare.chunks as i; i.CHUNK_BYTES = 400\nimport prepare_data; prepare_data.main()"
    arguments = ["--input", str(corpus / "*"), "--output", str(output), "--tokenizer", "bytes", "--workers", "2"]
    arguments += ["--shard-mb", "0.0015", "--on-error", "skip"]
    for kill_at in (2, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None and len(list(output.glob(".progress/0*.json"))) < kill_at:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) in (0, -signal.SIGKILL)
        assert b"Error" not in process.stdout.read()  # ends when the last of its processes has
    prepare(inputs_of([corpus / "*"]), settings_of(output, **SMALL), run_locally(1))
    assert files_in(output) == prepared


def test_finished_work_is_found_done_and_other_work_refused(corpus, prepared, tmp_path, monkeypatch):
    inputs, settings = inputs_of([corpus / "*"]), settings_of(tmp_path, **SMALL)
    prepare(inputs, settings, run_locally(1))
    monkeypatch.setattr(workers, "run_task", None)
    assert prepare(inputs, settings, run_locally(1)).documents == read_manifest(tmp_path).documents
    with pytest.raises(UserError, match=r"holds another preparation[^$]*shard_bytes: 1500 there, 99 now"):
        prepare(inputs, dataclasses.replace(settings, shard_bytes=99), run_locally(1))
    with pytest.raises(UserError, match=r"holds another preparation[^$]*\n  input \S+\.gz: name: "):
        prepare(inputs[1:], settings, run_locally(1))
    assert files_in(tmp_path) == prepared


def test_unfinished_work_of_changed_inputs_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", json_lines(["a"]) + b"{\n")
    with pytest.raises(UserError, match="line 2: not JSON"):
        prepare(inputs_of([path]), settings_of(tmp_path / "out"), run_locally(1))
    write(path, json_lines(["other"]))
    with pytest.raises(
        UserError, match=r"another preparation[^$]*  input \S+x\.jsonl: bytes: \d+ there, \d+ now, modif"
    ):
        prepare(inputs_of([path]), settings_of(tmp_path / "out"), run_locally(1))
    with pytest.raises(UserError, match=r"holds other files \(out, x.jsonl\); give a new directory"):
        prepare(inputs_of([path]), settings_of(tmp_path), run_locally(1))


def test_of_many_changed_inputs_some_are_named(tmp_path):
    paths = [write(tmp_path / f"{number}.jsonl", json_lines(["a"])) for number in range(10, 30)]
    settings = settings_of(tmp_path / "out")
    prepare(inputs_of(paths), settings, run_locally(1))
    for path in paths[7:17]:
        write(path, json_lines(["other"]))
    with pytest.raises(UserError) as error:
        prepare(inputs_of(paths), settings, run_locally(1))
    _, *named, more = str(error.value).split("\n")
    assert all(f"{number}.jsonl" in line for number, line in zip(range(17, 22), named, strict=True))
    assert more == "  and 5 inputs more"


def test_inputs_that_are_in_whole_shards_are_not_read_again(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{number}.txt", TEXTS[-2].encode()) for number in range(4)]
    settings = settings_of(tmp_path / "out", shard_bytes=len(TEXTS[-2]))
    read, asked = TextInput.read, []

    def read_until(self):
        asked.append(self.path.name)
        if len(asked) == 3:
            raise Killed
        return read(self)

    monkeypatch.setattr(TextInput, "read", read_until)
    with pytest.raises(Killed):
        prepare(inputs_of(paths), settings, run_locally(1))
    prepare(inputs_of(paths), settings, run_locally(1))
    assert asked == ["0.txt", "1.txt", "2.txt", "1.txt", "2.txt", "3.txt"]  # 1 was whole, but for its report
    assert len(texts_in(tmp_path / "out")) == 4


def test_only_one_process_at_a_time(tmp_path):
    path = write(tmp_path / "x.jsonl", json_lines(["a"]))
    settings = settings_of(tmp_path / "out")

    def second(*_):
        prepare(inputs_of([path]), settings, run_locally(1))

    with pytest.raises(UserError, match="another process is preparing it"):
        prepare(inputs_of([path]), settings, second)


def test_a_data_set_that_has_moved_on_says_how_to_name_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "a"}])
    source = HubInput("owner/corpus", None, "train", "text", "old")
    prepare([source], settings_of(tmp_path / "out"), run_locally(1))
    with pytest.raises(
        UserError, match=r"owner/corpus: revision: 'old' there, 'new' now; owner/name@revision names on"
    ):
        prepare([dataclasses.replace(source, revision="new")], settings_of(tmp_path / "out"), run_locally(1))


def test_ctrl_c_does_not_wait_for_workers(tmp_path, corpus):
    """However often it is pressed."""
    program = "import prepare_data as p, lm2_jax.data.prepare.chunks as i; i.CHUNK_BYTES = 400\n"
    program += (
        "import lm2_jax.data.prepare.workers as q; q._start_worker = __import__('stuck').start; p.run_command(p.main)"
    )
    stuck = "import time\nfrom pathlib import Path\ndef start():\n    import signal\n"
    stuck += "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    Path('started').touch()\n    time.sleep(1000)\n"
    write(tmp_path / "stuck.py", stuck.encode())
    arguments = ["--input", str(corpus / "*"), "--output", "out", "--tokenizer", "bytes", "--workers", "2"]
    process = subprocess.Popen(
        interruptible([sys.executable, "-c", program, *arguments]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools", tmp_path)))},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (tmp_path / "started").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said


def test_groups():
    class Sized:
        def __init__(self, size):
            self.size = size

    sizes = [10, 20, 80, 200, 5, None, 5, 90, 6]
    groups = group_inputs([Sized(size) for size in sizes], 100)
    assert [[source.size for source in group] for group in groups] == [[10, 20], [80], [200], [5], [None], [5, 90], [6]]


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
    (axes,) = prepare_data.plot_lengths(np.array([0, 3, 5, 5, 300])).axes
    assert sum(bar.get_height() for bar in axes.patches) == 5
    assert (axes.get_xscale(), axes.get_title()) == ("log", "5 documents")


def test_padding_share():
    lengths = np.array([1, 2, 34, 66])  # 0, 1, 33 and 65 positions: 1 + 2 + 3 segments of 32
    table = prepare_data.padding_table(lengths)
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
