"""Journals: appended to on disks, in parts in stores, and the same text."""

import random

import pytest

from lm2_jax.common.journal import Journal
from lm2_jax.common.records import drop_records_after, read_records


@pytest.fixture(params=["disk", "store"])
def path(request, tmp_path):
    directory = tmp_path if request.param == "disk" else request.getfixturevalue("bucket").path("run")
    return directory / "metrics.jsonl"


def append(path, *steps):
    journal = Journal(path)
    for step in steps:
        journal.write(f'{{"step": {step}}}\n')
        journal.flush()
    return journal


def steps(path):
    return [record["step"] for record in read_records(path)]


def test_what_is_appended_is_read(path):
    assert not Journal(path).exists()
    with pytest.raises(FileNotFoundError):
        read_records(path)
    drop_records_after(path, 3)
    append(path, 1, 2)  # killed
    assert steps(path) == [1, 2]
    append(path, 3).close()
    assert steps(path) == [1, 2, 3] and path.read_text() == Journal(path).read()


def test_records_are_cut_back(path):
    append(path, 1, 2, 3, 4)
    drop_records_after(path, 2)
    assert steps(path) == [1, 2]
    append(path, 30)  # shorter or longer than what was there
    assert steps(path) == [1, 2, 30]


@pytest.mark.parametrize("requests", range(1, 31))
def test_any_moment_of_a_kill_leaves_the_text(requests, bucket):
    """Writing stops after any number of requests that change something; the text is never mixed or doubled."""
    path, rng, left = bucket.path("run/metrics.jsonl"), random.Random(requests), requests

    def stop(method, name):
        nonlocal left
        left -= method != "GET"
        return 400 if left < 0 else None

    append(path, 1, 2, 3)
    bucket.emulator.fault = stop
    last = 3
    with pytest.raises(OSError):
        while True:
            last = rng.randint(1, last)
            drop_records_after(path, last)
            append(path, *range(last + 1, last + 5)).close()
            last += 4
    bucket.emulator.fault = lambda method, name: None
    found = steps(path)
    assert found == list(range(1, len(found) + 1)) and len(found) >= last
    append(path, *range(len(found) + 1, len(found) + 3)).close()
    assert steps(path) == list(range(1, len(found) + 3))
