"""Paths of object stores: what a user's text means, and what a path of a store does."""

import errno
import io
import os
import pickle
import random
import time
from pathlib import Path

import pytest
from helpers import short_config

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import content_digest, expand_paths, write_atomically
from lm2_jax.common.local_copies import local_copy, local_tree
from lm2_jax.common.storage import StorePath, read_ranges, to_local_path, to_path
from lm2_jax.common.trees import move_file, move_tree, remove_tree
from lm2_jax.training.run_dir import open_run_dir


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("~/runs/a", "{home}/runs/a"),
        ("~", "{home}"),
        ("$HOME/runs", "{home}/runs"),
        ("${HOME}/runs", "{home}/runs"),
        ("file:///data/a%20b", "/data/a b"),
        ("runs/a~b", "runs/a~b"),
        ("a:b/c", "a:b/c"),
        ("~other/x", "~other/x"),
    ],
)
def test_paths_of_this_machine(text, meaning, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert to_path(text) == Path(meaning.format(home="/users/me"))


@pytest.mark.parametrize("text", ["hdfs://a/b", "HDFS:/a/b", "http://a/b"])
def test_unknown_schemes_are_refused_in_a_sentence(text):
    with pytest.raises(UserError, match=r"train\.run_dir: .*:// is not known; give gs://"):
        to_path(text, "train.run_dir")


def test_addresses_that_pathlib_has_shortened():
    assert str(to_path(Path("gs://bucket/a//b"))) == "gs://bucket/a/b"
    with pytest.raises(UserError, match="names no bucket"):
        to_path("gs://")
    with pytest.raises(UserError, match=r"s3:// needs s3fs; pip install s3fs"):
        to_path("s3://bucket/a")
    with pytest.raises(UserError, match="give a path of this machine here"):
        to_local_path("s3://bucket/x")


def test_names():
    path = to_path("gs://bucket/a/b.tar.gz")
    assert (path.name, path.stem, path.suffix, path.suffixes) == ("b.tar.gz", "b.tar", ".gz", [".tar", ".gz"])
    assert path.parent / "c" == to_path("gs://bucket/a/c") and path.with_name("c") == path.parent / "c"
    assert path.with_suffix(".zst").name == "b.tar.zst"
    assert pickle.loads(pickle.dumps(path)) == path and len({path, to_path(str(path))}) == 1
    with pytest.raises(TypeError):  # a library would make a local folder gs:/bucket of it
        os.fspath(path)


def test_files_and_directories(bucket):
    path = bucket.path("a/b.txt")
    assert not path.exists() and not path.parent.exists()
    write_atomically(path, "some\r\ntext")
    assert path.is_file() and path.parent.is_dir() and not path.is_dir() and not path.parent.is_file()
    assert path.read_bytes() == b"some\r\ntext" and path.read_text() == "some\ntext" and path.stat().st_size == 10
    before = path.stat().version
    path.write_text("other")
    assert path.stat().version != before and path.read_text() == "other"
    bucket.path("a/c/d.txt").write_text("")
    assert [p.name for p in bucket.path("a").iterdir()] == ["b.txt", "c"]
    assert [p.name for p in bucket.path("a").glob("*.txt")] == ["b.txt"]
    assert bucket.path("a").sizes() == {"b.txt": 5}
    bucket.emulator.requests.clear()
    move_tree(bucket.path("a"), bucket.path("moved"))
    assert bucket.names() == ["moved/b.txt", "moved/c/d.txt"]
    assert "data" not in {kind for _, _, kind in bucket.emulator.requests}  # the store copies, nothing comes here
    move_file(bucket.path("moved/b.txt"), bucket.path("moved/e.txt"))
    assert bucket.names() == ["moved/c/d.txt", "moved/e.txt"]
    remove_tree(bucket.path("moved"))
    remove_tree(bucket.path("moved"))
    assert bucket.names() == []


def test_what_others_write_is_seen(bucket):
    """A listing that never expires would hide it from `exists`, `iterdir` and `glob`."""
    directory = bucket.path("runs")
    bucket.emulator.write(bucket.name, "runs/1/a", b"")
    assert [path.name for path in directory.iterdir()] == ["1"] and not (directory / "2").exists()
    bucket.emulator.write(bucket.name, "runs/2/a", b"")
    assert [path.name for path in directory.iterdir()] == ["1", "2"] and (directory / "2").exists()
    assert [path.name for path in directory.glob("*")] == ["1", "2"]


def test_reading_parts(bucket):
    data = random.Random(0).randbytes(100_000)
    path = bucket.path("data")
    path.write_bytes(data)
    with path.open("rb") as file:
        assert file.read(10) == data[:10]
        file.seek(-7, io.SEEK_END)
        assert file.read() == data[-7:] and file.read() == b""
        file.seek(50)
        assert file.read(100) == data[50:150]
    assert read_ranges([(path, 5, 9), (path, 99_998, 100_000), (path, 0, 1)]) == [data[5:9], data[-2:], data[:1]]
    local = local_copy(path)
    assert local.read_bytes() == data and content_digest(path) == content_digest(local)


def test_globs_name_objects(bucket):
    for name in ("texts/a.txt", "texts/deep/b.txt", "texts/c.bin"):
        bucket.path(name).write_text("x")
    assert [p.name for p in expand_paths([f"{bucket.url}/texts/*.txt"], "data.path")] == ["a.txt"]
    assert [p.name for p in expand_paths([f"{bucket.url}/texts/**/*.txt"], "data.path")] == ["a.txt", "b.txt"]
    with pytest.raises(UserError, match=r"data\.path: gs://.*/texts is a directory"):
        expand_paths([f"{bucket.url}/texts"], "data.path")
    with pytest.raises(UserError, match=r"gs://.*/nothing does not exist"):
        expand_paths([f"{bucket.url}/nothing"], "data.path")


def test_copies_are_of_the_newest_version(bucket):
    path = bucket.path("tree/file.txt")
    path.write_text("one")
    first = local_copy(path)
    bucket.emulator.requests.clear()
    assert local_copy(path) == first
    assert not [kind for _, _, kind in bucket.emulator.requests if kind == "data"]
    path.write_text("two")
    assert local_copy(path).read_text() == "two" and local_copy(path).name == "file.txt"
    assert (local_tree(path.parent) / "file.txt").read_text() == "two"
    path.write_text("three")
    assert (local_tree(path.parent) / "file.txt").read_text() == "three"


def test_old_copies_are_removed(bucket, tmp_path, monkeypatch):
    """Their directory is looked through once a process, not once a file: a data set may have thousands."""
    copies, looks, iterdir = tmp_path / "cache" / "copies", [], Path.iterdir
    for name, days in (("old", 8), ("new", 6)):
        (copies / name).mkdir(parents=True)
        os.utime(copies / name, (time.time() - days * 86_400,) * 2)
    monkeypatch.setattr(Path, "iterdir", lambda path: looks.append(path) or iterdir(path))
    for name in "abc":
        bucket.path(name).write_text(name)
        assert local_copy(bucket.path(name)).read_text() == name
    assert (copies / "new").is_dir() and not (copies / "old").exists()
    assert looks == [copies]


# --- Stores that fail ------------------------------------------------------------------------------------------------


def test_no_bucket_and_no_permission_are_told(bucket):
    for action in (lambda p: p.write_text("x"), lambda p: p.read_text(), lambda p: p.stat()):
        with pytest.raises(FileNotFoundError) as caught:
            action(to_path("gs://no-such-bucket/a"))
        assert caught.value.strerror == "no such object, or no such bucket"
        assert caught.value.filename == "gs://no-such-bucket/a"
    bucket.emulator.fault = lambda method, name: 403
    for action in (lambda p: p.write_text("x"), lambda p: p.read_text(), lambda p: p.exists()):
        with pytest.raises(PermissionError) as caught:
            action(bucket.path("a"))
        assert caught.value.strerror == "no permission"


def test_failures_of_the_network_are_tried_again(bucket, impatient):
    impatient(30)
    refused = iter([503] * 40)  # more than gcsfs itself would try
    bucket.emulator.fault = lambda method, name: next(refused, None)
    bucket.path("a").write_text("x")
    assert bucket.path("a").read_text() == "x"


def test_a_network_that_stays_away(bucket, impatient):
    impatient(0.5)
    bucket.emulator.fault = lambda method, name: 503
    with pytest.raises(OSError, match="the store cannot be reached") as caught:
        bucket.path("a").write_text("x")
    assert caught.value.errno == errno.EIO and caught.value.filename == str(bucket.path("a"))


def test_a_hundred_thousand_objects(bucket):
    objects = {f"many/{number:06}": b"" for number in range(100_000)}
    for name, data in objects.items():
        bucket.emulator.write(bucket.name, name, data)
    directory = bucket.path("many")
    assert len(directory.files()) == 100_000 and len(list(directory.iterdir())) == 100_000
    bucket.emulator.requests.clear()
    assert directory.is_dir() and (directory / "099999").is_file() and not (directory / "x").exists()
    assert len(bucket.emulator.requests) < 10  # pages are not turned to answer that


def test_a_store_path_is_one():
    assert isinstance(to_path("gs://bucket/a"), StorePath)


def test_home_in_a_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert open_run_dir(short_config("~/runs/a"), None) == tmp_path / "home/runs/a"
    assert (tmp_path / "home/runs/a/config.yaml").is_file() and [p.name for p in tmp_path.iterdir()] == ["home"]
    (tmp_path / "home/text.txt").write_text("x")
    assert expand_paths(["~/*.txt"], "data.path") == [tmp_path / "home/text.txt"]
