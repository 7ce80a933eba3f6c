"""Prepared shards in a bucket: read by records, cached as a whole, and never waited for."""

import json
import os
import threading
import time

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from helpers import REPOSITORY

from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.common.local_copies import download
from lm2_jax.common.storage import read_ranges
from lm2_jax.config import load_config
from lm2_jax.data import shard_layout, stored_shards
from lm2_jax.data.documents import Mixture
from lm2_jax.data.lanes import LaneDataset, Lanes, make_iterator
from lm2_jax.data.prepared import MANIFEST, PreparedSource, make_manifest
from lm2_jax.data.shard_writing import Encoded, write_shard

VOCABULARY = 32_000


def prepared(directory, *shards):
    """A prepared directory with a shard for each list of documents' lengths; and the documents' tokens."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    documents, written = [], []
    for number, lengths in enumerate(shards):
        tokens = rng.integers(0, VOCABULARY, sum(lengths), dtype=np.int32)
        encoded = Encoded(tokens, np.array([[length, 4 * length] for length in lengths], np.int32))
        documents += encoded.documents()
        written.append(write_shard(directory, directory, f"{number:05}-00000", "arrayrecord", [encoded], VOCABULARY))
    tokenizer = {"kind": "llama3", "file": None, "fingerprint": "0" * 16, "vocab_size": VOCABULARY}
    values = {"tokenizer": tokenizer, "empty": 0, "skipped": 0, "problems": (), "settings": {}, "sources": ()}
    (directory / MANIFEST).write_text(make_manifest(format="arrayrecord", shards=tuple(written), **values))
    return documents


def uploaded(bucket, directory, name="prepared"):
    for file in directory.iterdir():
        bucket.path(f"{name}/{file.name}").upload(file)
    return f"{bucket.url}/{name}"


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def data_requests(bucket):
    return [name for _, name, kind in bucket.emulator.requests if kind == "data" and name.endswith(".arrayrecord")]


def tokens_of(source, *numbers):
    return [document.tokens.tolist() for document in source.get_many(numbers or range(len(source)))]


def test_places_of_records(tmp_path):
    """Of any size, at any place of a block of 64 KiB."""
    rng = np.random.default_rng(0)
    sizes = np.array([*range(1, 300), *rng.integers(1, 70_000, 60), 300_000, 127, 128, 16_383, 16_384, 65_470, 65_536])
    records = [rng.bytes(size) for size in rng.permutation(sizes)]
    writer = ArrayRecordWriter(str(tmp_path / "file"), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    data = (tmp_path / "file").read_bytes()
    ends = shard_layout.chunk_ends(np.array([len(record) for record in records]))
    for record, end in zip(records, ends.tolist(), strict=True):
        start, stop = shard_layout.span(end, len(record))
        assert shard_layout.record(data[start:stop], start) == record


def test_documents_are_read_one_by_one(bucket, tmp_path):
    documents = prepared(tmp_path / "prepared", [3, 40_000, 1, 500], [7, 8])
    source = PreparedSource([uploaded(bucket, tmp_path / "prepared")])
    assert tokens_of(source) == [document.tolist() for document in documents]
    bucket.emulator.requests.clear()
    assert source[3].tokens.tolist() == documents[3].tolist()
    assert len(bucket.emulator.requests) == 1
    mixture = Mixture([source, source], [1, 1])
    assert tokens_of(mixture, 9, 0, 6) == [documents[n].tolist() for n in (3, 0, 0)]


def test_an_epoch_crosses_the_network_once(bucket, tmp_path):
    documents = prepared(tmp_path / "prepared", [50, 60], [70, 80])
    url, cache = uploaded(bucket, tmp_path / "prepared"), tmp_path / "cache" / "shards"
    source = PreparedSource([url], cache_bytes=10**6)
    wait_for(lambda: len(list(cache.glob("*.arrayrecord"))) == 2)
    assert len(data_requests(bucket)) == 2
    bucket.emulator.fault = lambda method, name: 403  # all is here
    assert tokens_of(source) == [document.tolist() for document in documents]
    bucket.emulator.fault = lambda method, name: None
    bucket.emulator.requests.clear()
    again = PreparedSource([url], cache_bytes=10**6)  # another run, or this one resumed
    wait_for(lambda: len(again._stored._here) == 2)
    assert tokens_of(again) == tokens_of(source) and not data_requests(bucket)


def test_the_cache_keeps_its_size(bucket, tmp_path):
    """It holds as many shards as fit; those of other data make room, those unused for longest first."""
    prepared(tmp_path / "prepared", [20_000], [30_000], [25_000])
    cache = tmp_path / "cache" / "shards"
    cache.mkdir(parents=True)
    for name, age in (("old", 1000), ("new", 10)):
        (cache / name).write_bytes(bytes(100_000))
        when = time.time() - age
        os.utime(cache / name, (when, when))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "prepared").glob("*.arrayrecord"))]
    source = PreparedSource([uploaded(bucket, tmp_path / "prepared")], cache_bytes=sizes[0] + sizes[1] + 120_000)
    wait_for(lambda: len(source._stored._here) == 2)
    assert (cache / "new").exists() and not (cache / "old").exists()
    assert sum(file.stat().st_size for file in cache.iterdir()) <= sizes[0] + sizes[1] + 120_000
    bucket.emulator.requests.clear()
    tokens_of(source)
    assert len(data_requests(bucket)) == 1  # of the third shard


def test_sources_share_the_cache(bucket, tmp_path):
    """Two sources of a run hold together what one may, and none removes what the other has."""
    sizes, sources = [], []
    for number in range(2):
        prepared(tmp_path / str(number), [20_000 + number], [30_000 + number])
        sizes.append(max(path.stat().st_size for path in (tmp_path / str(number)).glob("*.arrayrecord")))
    for number in range(2):
        url = uploaded(bucket, tmp_path / str(number), number)
        sources.append(PreparedSource([url], cache_bytes=int(3.5 * sizes[0])))
    wait_for(lambda: [len(source._stored._here) for source in sources] == [2, 1])
    cache = tmp_path / "cache" / "shards"
    assert sum(file.stat().st_size for file in cache.iterdir()) <= 3.5 * sizes[0]
    tokens_of(sources[0])
    for file in cache.iterdir():  # another process makes room for data of its own
        file.unlink()
    assert all(len(tokens_of(source)) == 2 for source in sources)


def test_a_shard_that_is_being_copied_is_left_alone(bucket, tmp_path, monkeypatch):
    """A second source makes room while the first one's shard is on its way; what a killed process left goes."""
    cache, copied, go_on = tmp_path / "cache" / "shards", threading.Semaphore(0), threading.Event()
    cache.mkdir(parents=True)
    (cache / ".killed").write_bytes(bytes(100_000))
    os.utime(cache / ".killed", (time.time() - 3600,) * 2)

    def slow(*arguments):
        download(*arguments)
        copied.release()
        go_on.wait(30)

    monkeypatch.setattr(stored_shards, "download", slow)
    urls = []
    for name in ("training", "validation"):
        prepared(tmp_path / name, [20_000 + len(urls)])
        urls.append(uploaded(bucket, tmp_path / name, name))
    first = PreparedSource([urls[0]], cache_bytes=300_000)
    assert copied.acquire(timeout=30)
    second = PreparedSource([urls[1]], cache_bytes=300_000)
    assert copied.acquire(timeout=30)
    assert len(list(cache.glob(".*"))) == 2 and not (cache / ".killed").exists()
    go_on.set()
    wait_for(lambda: len(first._stored._here) == len(second._stored._here) == 1)


def test_files_of_another_writer_are_read_as_a_whole(bucket, tmp_path):
    """ArrayRecord may lay them out otherwise, which the records' checksums show."""
    documents = prepared(tmp_path / "prepared", [50, 60])
    file = tmp_path / "prepared" / "00000-00000.arrayrecord"
    records = ArrayRecordReader(str(file)).read_all()
    writer = ArrayRecordWriter(str(file), "group_size:2,zstd")
    for record in records:
        writer.write(record)
    writer.close()
    manifest = json.loads((tmp_path / "prepared" / MANIFEST).read_text())
    manifest["shards"][0]["bytes"] = file.stat().st_size
    (tmp_path / "prepared" / MANIFEST).write_text(json.dumps(manifest))
    source = PreparedSource([uploaded(bucket, tmp_path / "prepared")])
    assert tokens_of(source) == [document.tolist() for document in documents]


def test_damaged_and_missing_shards(bucket, tmp_path):
    prepared(tmp_path / "prepared", [500, 600])
    url = uploaded(bucket, tmp_path / "prepared")
    path = bucket.path("prepared/00000-00000.arrayrecord")
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(bytes(data))
    source = PreparedSource([url])
    bucket.emulator.fault = lambda method, name: 400
    with pytest.raises(TrainingFailed, match=r"gs://.*: the documents cannot be read \(the store cannot be reached"):
        source[1]
    bucket.emulator.fault = lambda method, name: None
    source[1]
    with pytest.raises(UserError, match=r"gs://.*arrayrecord: record 0 is damaged"):
        source[0]
    path.unlink()
    with pytest.raises(UserError, match=r"00000-00000\.arrayrecord: missing, though the manifest names it"):
        PreparedSource([url])


# --- A consumer at the rate of a compiled step -----------------------------------------------------------------------


@pytest.fixture
def far_shards(bucket, tmp_path):
    """Shards for lm2_125m, of documents of 50 to 3,000 tokens, in a store that answers after 20 ms."""
    rng = np.random.default_rng(1)
    prepared(tmp_path / "prepared", *[rng.integers(50, 3000, 250).tolist() for _ in range(4)])
    url = uploaded(bucket, tmp_path / "prepared")
    bucket.emulator.latency = 0.02
    return url


def share_waited(url, prefetch, cache_bytes, steps):
    """Share of the time that a consumer of lm2_125m's windows waits, at the least time that its step takes on a v5e."""
    data = load_config("lm2_125m").data
    figures = json.loads((REPOSITORY / "docs/results/compiled/lm2_125m.json").read_text())
    step = figures["programs"]["train"]["roofline"]["step"]
    lanes = Lanes(data.batch_size, data.segments_per_window, data.segment_length, data.boundaries)
    source = PreparedSource([url], cache_bytes=cache_bytes)
    windows = make_iterator(LaneDataset(source, source.ordinals(0), lanes), prefetch)
    began, waited = time.monotonic(), 0.0
    for _ in range(steps):
        asked = time.monotonic()
        next(windows)
        waited += time.monotonic() - asked
        time.sleep(step)
    if prefetch:
        windows.close()
    share = waited / (time.monotonic() - began)
    print(f"prefetch {prefetch}, cache {cache_bytes:,} bytes: waited {share:.1%} of {steps} steps of {step:.3f} s")
    return share


def test_a_consumer_hardly_waits(far_shards):
    assert share_waited(far_shards, load_config("lm2_125m").data.prefetch, 10**9, 16) < 0.05


def test_without_prefetch_and_cache_it_waits(far_shards, monkeypatch):
    """Documents are asked for one after the other, when their window is wanted."""
    get_many = PreparedSource.get_many
    monkeypatch.setattr(PreparedSource, "get_many", lambda self, ns: [get_many(self, [n])[0] for n in ns])
    assert share_waited(far_shards, 0, 0, 6) > 0.05


def test_ranges_of_nothing():
    assert read_ranges([]) == []
