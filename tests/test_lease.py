"""Leases: one run at a time in a directory of a store, or of a file system without locks."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from lm2_jax.common import lease
from lm2_jax.common.errors import UserError
from lm2_jax.common.files import lock_directory
from lm2_jax.common.storage import StorePath


@pytest.fixture(params=["store", "no locks"])
def directory(request, tmp_path, monkeypatch):
    """A directory of a store, and one of a file system that has no locks."""
    if request.param == "store":
        return request.getfixturevalue("bucket").path("run")

    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    return tmp_path


def write(directory, age=0.0, **holder):
    """A lease of another process, last renewed `age` seconds ago."""
    path = directory / lease.NAME
    path.write_text(json.dumps({"host": "tpu-7", "process": 123, "token": "theirs", **holder}))
    if isinstance(path, os.PathLike):
        os.utime(path, (time.time() - age, time.time() - age))
    else:
        bucket, name = path.key.split("/", 1)
        from store_helpers import _EMULATORS

        _EMULATORS[0].age(bucket, name, age)


def test_a_second_run_is_refused_and_told_who_holds_it(directory):
    with lock_directory(directory, "taken"):
        message = rf"taken \(process {os.getpid()} on {socket.gethostname()} holds its lease, renewed 0 seconds ago; "
        with pytest.raises(UserError, match=message), lock_directory(directory, "taken"):
            pass
    with lock_directory(directory, "taken"):  # given back
        pass
    assert not (directory / lease.NAME).exists()


def test_a_lease_of_another_machine_holds_for_five_minutes(directory):
    write(directory, age=290)
    message = r"process 123 on tpu-7 holds its lease, renewed 29\d seconds ago; one that is 5 minutes old is taken over"
    with pytest.raises(UserError, match=message), lock_directory(directory, "taken"):
        pass
    write(directory, age=301)
    with lock_directory(directory, "taken"):
        assert lease.read(directory / lease.NAME).holder["process"] == os.getpid()


def test_a_lease_of_a_process_that_was_killed_here_is_nobodys(directory):
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = {"machine": lease._machine(), "process": killed.pid, "started": lease._start_of(killed.pid)}
    write(directory, **here)
    with pytest.raises(UserError, match=f"process {killed.pid} on tpu-7"), lock_directory(directory, "taken"):
        pass
    killed.kill()
    killed.wait()
    with lock_directory(directory, "taken"):
        pass
    write(directory, **here | {"process": os.getpid()})  # a number that another process has now
    with lock_directory(directory, "taken"):
        pass


def test_a_lease_is_renewed(directory, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    with lock_directory(directory, "taken"):
        path = directory / lease.NAME
        before = path.stat()
        deadline = time.monotonic() + 20
        while path.stat().st_mtime_ns == before.st_mtime_ns:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_renewal_whose_answer_was_lost_is_one(bucket, monkeypatch):
    """It was tried again, and the second try found another version than it replaces: its own."""
    ended, write_if = [], StorePath.write_if

    def answered_late(self, *arguments):
        write_if(self, *arguments)
        raise FileExistsError(errno.EEXIST, "it is there already", str(self))

    monkeypatch.setattr(StorePath, "write_if", answered_late)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", ended.append)
    with lock_directory(bucket.path("run"), "taken"):
        before = bucket.path("run/.lease").stat().version
        time.sleep(0.5)
        assert bucket.path("run/.lease").stat().version != before
    assert not ended


def test_ages_are_told_by_the_clock_of_the_store(directory, monkeypatch):
    """A machine whose clock is wrong takes over no lease that is renewed."""
    write(directory, age=10)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    with pytest.raises(UserError, match=r"renewed 1\d seconds ago"), lock_directory(directory, "taken"):
        pass


_LOSER = """
import sys, time
from lm2_jax.common import lease
from lm2_jax.common.storage import to_path
lease.RENEWAL_SECONDS = 0.05
with lease.hold(to_path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_has_lost_it_ends(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", _LOSER, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    write(directory)  # it was silent for five minutes, and another took it over
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "lost, and so this process ends: process 123 on tpu-7" in errors


def test_one_of_many_gets_it(bucket):
    directory, results = bucket.path("run"), []
    barrier = threading.Barrier(8)

    def want():
        taken = lease._Lease(directory / lease.NAME)
        barrier.wait()
        try:
            taken.acquire("taken")
            results.append("got it")
        except UserError as error:
            results.append(str(error))

    for stale in (False, True):
        if stale:
            write(directory, age=400)
        results.clear()
        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results.count("got it") == 1 and len(results) == 8
