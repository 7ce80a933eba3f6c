"""Several processes of one run: they join, stop after the same step, and notice when one of them is gone.

Every process runs the same command. What only one may do (locks, logs, pictures) is done by the first.
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

from lm2_jax.common import lease
from lm2_jax.common.errors import TrainingFailed, UserError

_BEAT_SECONDS = 2.0  # between heartbeats
_SILENCE_SECONDS = 30.0  # heartbeat timeout; a thread sends heartbeats, so compiling and saving do not stop them
_ALIVE = "lm2_jax/alive/"  # prefix of keys of the coordination service: one key a process
_ENDED = "ended: "


def is_first() -> bool:
    """True in the process that locks, logs and draws; always true in a run of one process."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """True if this process is the only one of its run."""
    return jax.process_count() == 1


def for_all(value: bool) -> bool:
    """True if `value` is true in every process; all of them must call this."""
    return value if is_alone() else bool(multihost_utils.process_allgather(np.array(value)).all())


def wait_for_all(name: str) -> None:
    """Returns once every process has called it with this name."""
    if not is_alone():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes of a run, for as long as the context lasts; jax must not have been used before.

    On a TPU pod (and under Slurm, Open MPI or Kubernetes) jax finds the others by itself; elsewhere they are named by
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    A process that fails tells the others why, and they end too, with a message and exit code 1 (2 where the user can
    mend it); when one is killed, the others end within a minute. Process 0 runs the coordination service: if it is
    killed, jax usually aborts the others first, with its own message.

    Raises UserError if the others cannot be found.
    """
    _initialize()
    watch = _Watch(distributed.global_state.client)
    watch.start()
    try:
        yield
    except UserError as error:
        watch.end(str(error), 2)
    except TrainingFailed as error:
        watch.end(str(error), 1)
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError):  # most likely another process is gone: the watch will say so
            time.sleep(_SILENCE_SECONDS + 3 * _BEAT_SECONDS)
        traceback.print_exc()
        watch.end(f"{type(error).__name__} (see the traceback in its output)", 1)
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
    """Sends heartbeats through the coordination service, and ends this process when another has failed or is gone.

    Collectives would wait for a dead peer forever, and JAX's own heartbeats (100 seconds by default) end a process by
    an abort that does not say what happened.
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
                self._end_because(0, "is gone")
            now = time.monotonic()
            for process in set(range(self._count)) - {self._me}:
                text = told.get(process, "")
                if text.startswith(_ENDED):
                    code, reason = text.removeprefix(_ENDED).split(" ", 1)
                    self._end_because(process, f"has stopped: {reason}", int(code))
                if text != heard[process][0]:
                    heard[process] = text, now
                elif now - heard[process][1] > _SILENCE_SECONDS:
                    self._end_because(process, f"has been silent for {_SILENCE_SECONDS:.0f} seconds")

    def end(self, reason: str, code: int) -> NoReturn:
        """Ends this process and tells the others why."""
        self.stop()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell(f"{_ENDED}{code} {reason}")
            if self._me == 0:
                time.sleep(3 * _BEAT_SECONDS)  # the service ends with this process: let the others read it
        _exit(reason, code)

    def stop(self) -> None:
        """Ends the heartbeats and the watching."""
        self._over.set()

    def _tell(self, text: str) -> None:
        self._client.key_value_set(f"{_ALIVE}{self._me}", text, allow_overwrite=True)

    def _end_because(self, process: int, what: str, code: int = 1) -> NoReturn:
        if self._over.is_set():
            threading.Event().wait()  # this process is leaving by itself
        _exit(
            f"process {process} of {self._count} {what}. This one (process {self._me}) ends too; when the cause is "
            "mended, start all of them again: they resume from the newest checkpoint",
            code,
        )


def _exit(reason: str, code: int) -> NoReturn:
    """Ends the process at once: threads that wait for a dead peer could not be joined."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    lease.give_back()
    os._exit(code)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Makes SIGINT, SIGTERM and a pre-emption notice ask the loop to save and stop; a second signal ends the process.

    Yields a function to call after every step with that step's number; it returns True when it is time to stop. Several
    processes stop after the same step, whichever of them was asked, by jax's pre-emption service, which takes SIGTERM
    for the notice. Raises UserError if they have no such service.
    """
    has_service = distributed.global_state.preemption_sync_manager is not None
    if not (has_service or is_alone()):
        raise UserError("JAX_ENABLE_PREEMPTION_SERVICE: found false; leave it true: processes stop together by it")
    requested = threading.Event()

    def request(number: int, _: Any) -> None:
        requested.set()
        signal.signal(number, signal.default_int_handler)

    def request_of_all(number: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # which jax tells the other processes
        signal.signal(number, lambda *_: _exit("interrupted twice", 130))

    handlers = (
        dict.fromkeys((signal.SIGINT, signal.SIGTERM), request) if is_alone() else {signal.SIGINT: request_of_all}
    )
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield lambda step: requested.is_set() or (has_service and multihost_utils.reached_preemption_sync_point(step))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
