"""Leases: what stands for a lock where there are none, in object stores and on some network file systems.

A lease is a small file that names its holder, who renews it twice a minute. One that was not renewed for five minutes
is nobody's, and neither is that of a process of this machine that is gone. In Google's store only one of two processes
that want a lease gets it, since a writing is bound to what was read; elsewhere the second one may win, and the first
ends once it sees that. Ages are told by the store's clock, or the file server's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath, StorePath

LIFE_SECONDS = 300.0  # after which a lease that is not renewed is nobody's
RENEWAL_SECONDS = 30.0
NAME = ".lease"
_HELD: dict[str, _Lease] = {}  # by their tokens


@dataclasses.dataclass(frozen=True)
class Found:
    """A lease as it is written: who holds it, seconds since its renewal, and the version that a writing replaces."""

    holder: dict[str, Any]
    age: float
    version: str

    @property
    def is_over(self) -> bool:
        """True if it is nobody's."""
        return self.age > LIFE_SECONDS or _is_gone(self.holder)

    def __str__(self) -> str:
        return (
            f"process {self.holder.get('process')} on {self.holder.get('host')} holds its lease, renewed "
            f"{max(self.age, 0):.0f} seconds ago; one that is {LIFE_SECONDS / 60:.0f} minutes old is taken over"
        )


@contextlib.contextmanager
def hold(directory: AnyPath, complaint: str) -> Iterator[None]:
    """Holds the lease of a directory. Raises UserError with `complaint` and the holder if another process has it.

    If another process takes it over all the same, since this one could not renew it, this process ends with exit
    code 1: two runs would write over each other.
    """
    lease = _Lease(directory / NAME)
    lease.acquire(complaint)
    lease.start()
    try:
        yield
    finally:
        lease.release()


def give_back(seconds: float = 10.0) -> None:
    """Gives back what this process holds, before it ends at once; others need not wait then."""
    for lease in list(_HELD.values()):
        thread = threading.Thread(target=lease.release, daemon=True)  # which may wait for the network
        thread.start()
        thread.join(seconds)


class _Lease(threading.Thread):
    def __init__(self, path: AnyPath) -> None:
        super().__init__(name="lease", daemon=True)
        self._path, self._over = path, threading.Event()
        self._holder = {**_this_process(), "token": uuid.uuid4().hex}

    def acquire(self, complaint: str) -> None:
        """Takes the lease if it is nobody's. Raises UserError with `complaint` and the holder if it is not."""
        found = read(self._path)
        if found is not None and not found.is_over:
            raise UserError(f"{complaint} ({found})")
        _HELD[self._holder["token"]] = self
        with contextlib.suppress(FileExistsError):  # another process was faster, which is seen below
            self._write(found.version if found else "0")
        if found is not None and isinstance(self._path, Path):
            time.sleep(1)  # two may have replaced it
        if (found := read(self._path)) is None or not self._is_own(found):
            del _HELD[self._holder["token"]]
            raise UserError(f"{complaint} ({found})")

    def run(self) -> None:
        """Renews the lease until it is given back."""
        while not self._over.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):  # the next renewal may succeed
                found = read(self._path)
                if found is not None and not self._is_own(found):
                    print(f"error: {self._path}: lost, and so this process ends: {found}", file=sys.stderr, flush=True)
                    os._exit(1)
                self._write(found.version if found else "0")

    def _is_own(self, found: Found) -> bool:
        return found.holder.get("token") == self._holder["token"]

    def release(self) -> None:
        """Ends the renewals and gives the lease back."""
        _HELD.pop(self._holder["token"], None)
        self._over.set()
        self.join()
        with contextlib.suppress(OSError):
            found = read(self._path)
            if found is not None and self._is_own(found):
                self._path.unlink(missing_ok=True)

    def _write(self, version: str) -> None:
        """Writes the lease in place of a version ("0": of none). Raises FileExistsError if another one is there."""
        text = json.dumps(self._holder)
        if isinstance(self._path, Path):
            if version == "0":
                with self._path.open("x", encoding="utf-8") as file:
                    file.write(text)
                return
            partial = self._path.with_name(f"{NAME}.{self._holder['token']}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)
            return
        self._path.write_if(text.encode(), version)


def read(path: AnyPath) -> Found | None:
    """The lease that is written in a file; None if there is none. Raises OSError if that cannot be found out."""
    try:
        status = path.stat()
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    now = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # a file of this moment tells the time there
    now.write_text("")
    age = (now.stat().st_mtime_ns - status.st_mtime_ns) / 1e9
    now.unlink(missing_ok=True)
    try:
        holder = json.loads(text)
    except ValueError:  # half written, on a file system of this machine
        holder = {}
    version = status.version if isinstance(path, StorePath) else "1"
    return Found(holder, age, version)


@functools.cache
def _machine() -> str:
    """Tells apart kernels, and the containers of one that number their processes by themselves."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _this_process() -> dict[str, Any]:
    process = os.getpid()
    return {"host": socket.gethostname(), "process": process, "machine": _machine(), "started": _start_of(process)}


def _start_of(process: int) -> str:
    """The start of a process, in ticks of the machine; "" if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_gone(holder: dict[str, Any]) -> bool:
    """True if the holder was a process of this machine and is no more, or is this one, which has ended its run."""
    if not holder.get("started") or holder.get("machine") != _machine():
        return False
    process = holder.get("process", 0)
    if _start_of(process) != holder["started"]:
        return True
    return process == os.getpid() and holder.get("token") not in _HELD
