"""Several processes, one run: joining them, stopping them at the same step, and noticing that one is gone.

Every process runs the same command. What only one may do (locks, logs, pictures) is the first one's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the client of the coordination service has no public name
from jax.experimental import multihost_utils

from lm2_jax.common.errors import TrainingFailed, UserError

_BEAT_SECONDS = 2.0  # how often a process tells the others that it lives
_SILENCE_SECONDS = 30.0  # one that was silent so long is taken for dead; compiling and saving let the beat go on
_ALIVE = "lm2_jax/alive/"  # keys of the coordination service: one for each process
_LEFT = "left: "


def is_first() -> bool:
    """Whether this process is the one that locks, logs and draws; a single process is."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this process is the only one of its run."""
    return jax.process_count() == 1


def for_all(value: bool) -> bool:
    """Whether it is true in every process; all of them must ask."""
    return value if is_alone() else bool(multihost_utils.process_allgather(np.array(value)).all())


def wait_for_all(name: str) -> None:
    """Returns once every process has come here."""
    if not is_alone():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of several; jax must not have been used before.

    On a TPU pod (and under Slurm, Open MPI or Kubernetes) jax finds the others by itself; elsewhere they are named by
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    A process that fails tells the others why; they end too, and so they do within a minute when one is killed: with a
    message and exit code 1 (2 where the user can mend it). Only when process 0 is killed, with which the service by
    which they know of each other dies, jax mostly is first to end them: with a message of its own, by an abort.

    Raises UserError if the others cannot be found.
    """
    _initialize()
    watch = _Watch(distributed.global_state.client)
    watch.start()
    try:
        yield
    except UserError as error:
        watch.leave(str(error), 2)
    except TrainingFailed as error:
        watch.leave(str(error), 1)
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError):  # most likely another process is gone: the watch will say so
            time.sleep(_SILENCE_SECONDS + 3 * _BEAT_SECONDS)
        traceback.print_exc()
        watch.leave(f"{type(error).__name__} (its traceback is where it happened)", 1)
    finally:
        watch.stop()
        jax.distributed.shutdown()


def _initialize() -> None:
    numbers: dict[str, int | None] = {}
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise UserError(f"{name}: found {text!r}; expected a number")
        numbers[name] = None if text is None else int(text)
    try:
        jax.distributed.initialize(
            num_processes=numbers["JAX_NUM_PROCESSES"],
            process_id=numbers["JAX_PROCESS_ID"],
            shutdown_timeout_seconds=60,
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"--distributed: the processes of this run cannot be found ({str(error).strip().splitlines()[0]}); on a "
            "TPU pod start the same command on every worker; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of "
            "process 0, the same for all), JAX_NUM_PROCESSES and JAX_PROCESS_ID (0, 1, ...)"
        ) from None


class _Watch(threading.Thread):
    """Tells the others that this process lives, and ends it when one of them has failed or gone.

    By the coordination service, which process 0 runs: collectives would wait for a dead peer for ever.
    """

    def __init__(self, client: Any) -> None:
        super().__init__(name="peers", daemon=True)
        self._client = client
        self._me, self._count = jax.process_index(), jax.process_count()
        self._over = threading.Event()

    def run(self) -> None:
        beats, heard = 0, {process: ("", time.monotonic()) for process in range(self._count)}
        while not self._over.wait(_BEAT_SECONDS):
            beats += 1
            try:
                self._tell(str(beats))
                told = {int(key.removeprefix(_ALIVE)): text for key, text in self._client.key_value_dir_get(_ALIVE)}
            except jax.errors.JaxRuntimeError:
                self._end(0, "is gone")
            now = time.monotonic()
            for process in set(range(self._count)) - {self._me}:
                text = told.get(process, "")
                if text.startswith(_LEFT):
                    code, reason = text.removeprefix(_LEFT).split(" ", 1)
                    self._end(process, f"has stopped: {reason}", int(code))
                if text != heard[process][0]:
                    heard[process] = text, now
                elif now - heard[process][1] > _SILENCE_SECONDS:
                    self._end(process, f"has been silent for {_SILENCE_SECONDS:.0f} seconds")

    def leave(self, reason: str, code: int) -> NoReturn:
        """Ends this process and tells the others why."""
        self.stop()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(f"{_LEFT}{code} {reason}")
            if self._me == 0:
                time.sleep(3 * _BEAT_SECONDS)  # the service ends with this process: let the others read it
        _exit(reason, code)

    def stop(self) -> None:
        """No more beats, and no more watching."""
        self._over.set()

    def _tell(self, text: str) -> None:
        self._client.key_value_set(f"{_ALIVE}{self._me}", text, allow_overwrite=True)

    def _end(self, process: int, what: str, code: int = 1) -> NoReturn:
        if self._over.is_set():
            threading.Event().wait()  # this process is leaving by itself
        _exit(
            f"process {process} of {self._count} {what}. This one (process {self._me}) ends too; when the cause is "
            "mended start all of them again: they go on from the newest checkpoint",
            code,
        )


def _exit(reason: str, code: int) -> NoReturn:
    """Ends the process at once: threads that wait for a dead peer could not be joined."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """SIGINT and SIGTERM ask the loop to save and leave; a second one ends the process at once.

    Gives a function of the step just done, to be called after every step: whether to stop now. Several processes stop
    after the same step, whichever of them was asked.
    """
    asked = threading.Event()

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler)

    def ask_all(number: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # which jax tells the other processes
        signal.signal(number, lambda *_: _exit("interrupted twice", 130))

    handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), ask) if is_alone() else {signal.SIGINT: ask_all}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield (lambda _: asked.is_set()) if is_alone() else multihost_utils.reached_preemption_sync_point
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
