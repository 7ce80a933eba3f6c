"""Preparing data: the same output with any number of workers, after kills, and for a second call."""

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
import numpy as np
import pytest
from helpers import interruptible
from prepare_helpers import ROOT, TEXTS, files_in, inputs_of, json_lines, settings_of, texts_in, write

from lm2_jax.common.errors import UserError
from lm2_jax.data.prepare import shards
from lm2_jax.data.prepare.inputs import HubInput, TextInput
from lm2_jax.data.prepare.plan import prepare
from lm2_jax.data.prepare.shards import group_inputs, run_locally
from lm2_jax.data.prepared import PreparedSource, read_manifest


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("lm2_jax.data.prepare.chunks.CHUNK_BYTES", 400)


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

    replace, run_task = Path.replace, shards.run_task
    monkeypatch.setattr(Path, "replace", lambda self, target: (perhaps(), replace(self, target))[1])
    monkeypatch.setattr(shards, "run_task", lambda *arguments: (perhaps(), run_task(*arguments))[1])
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
    program = (
        "import lm2_jax.data.prepare.chunks as i; i.CHUNK_BYTES = 400\nfrom lm2_jax import prepare_data as p; p.main()"
    )
    arguments = ["--input", str(corpus / "*"), "--output", str(output), "--tokenizer", "bytes", "--workers", "2"]
    arguments += ["--shard-mb", "0.0015", "--on-error", "skip"]
    for kill_at in (2, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
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
    monkeypatch.setattr(shards, "run_task", None)
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


def _replace(path, data):
    """Other bytes, of the same size and with the same time."""
    assert len(data) == path.stat().st_size
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.utime(write(path, data), ns=times)


def test_other_bytes_of_the_same_size_and_time_are_noticed(tmp_path):
    path = write(tmp_path / "x.txt", b"one text")
    unfinished, finished = settings_of(tmp_path / "unfinished"), settings_of(tmp_path / "finished")
    with pytest.raises(Killed):
        prepare(inputs_of([path]), unfinished, lambda *_: throw(Killed))
    prepare(inputs_of([path]), finished, run_locally(1))
    _replace(path, b"two text")
    with pytest.raises(UserError, match=r"holds unfinished work of another preparation[^$]*x\.txt: content: "):
        prepare(inputs_of([path]), unfinished, run_locally(1))
    with pytest.raises(UserError, match=r"holds another preparation[^$]*x\.txt: sha256: "):
        prepare(inputs_of([path]), finished, run_locally(1))
    _replace(path, b"one text")
    for settings in (unfinished, finished):
        assert prepare(inputs_of([path]), settings, run_locally(1)).documents == 1


def test_a_plan_that_knows_no_contents_is_resumed(tmp_path):
    """Left by an earlier version."""
    path, settings = write(tmp_path / "x.txt", b"one text"), settings_of(tmp_path / "out")
    with pytest.raises(Killed):
        prepare(inputs_of([path]), settings, lambda *_: throw(Killed))
    plan = json.loads((settings.progress_dir / "plan.json").read_text())
    for source in plan["inputs"]:
        source.pop("content", None)
    write(settings.progress_dir / "plan.json", json.dumps(plan).encode())
    assert prepare(inputs_of([path]), settings, run_locally(1)).documents == 1


def throw(error):
    raise error


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
    program = "from lm2_jax import prepare_data as p; import lm2_jax.data.prepare.chunks as i; i.CHUNK_BYTES = 400\n"
    program += (
        "import lm2_jax.data.prepare.shards as q; q._start_worker = __import__('stuck').start; p.run_command(p.main)"
    )
    stuck = "import time\nfrom pathlib import Path\nfrom lm2_jax.data.prepare.shards import _start_worker\n"
    stuck += "def start():\n    _start_worker()\n    Path('started').touch()\n    time.sleep(1000)\n"
    write(tmp_path / "stuck.py", stuck.encode())
    arguments = ["--input", str(corpus / "*"), "--output", "out", "--tokenizer", "bytes", "--workers", "2"]
    process = subprocess.Popen(
        interruptible([sys.executable, "-c", program, *arguments]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path)))},
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
