"""A run's TensorBoard file."""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from lm2_jax.common.records import Record, drawable
from lm2_jax.common.storage import AnyPath, StorePath

_UPLOAD_SECONDS = 60.0
_LONGEST = 1 << 22  # bytes of a file in a store, which is uploaded as a whole


class Board(EventsWriter):
    """A TensorBoard file, written by the calling thread.

    SummaryWriter's own thread dies on a full disk, and the next write waits for it forever. In a store the file grows
    here, and is uploaded once a minute and at the end; every few megabytes a new one begins.
    """

    def __init__(self, directory: AnyPath, first_step: int) -> None:
        directory.mkdir(exist_ok=True)
        self._store = directory if isinstance(directory, StorePath) else None
        self._here = tempfile.TemporaryDirectory() if self._store else None
        self._begin(directory)
        # TensorBoard drops what an earlier process wrote of this step and later ones
        self.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, record: Record) -> None:
        """Adds the numbers of a record, at its step and time."""
        event = Event(step=record["step"], wall_time=record["time"])
        event.summary.value.extend(scalar(key, value).value[0] for key, value in drawable(record).items())
        self.write_event(event)

    def _begin(self, directory: AnyPath) -> None:
        """Begins a file."""
        if self._store is None:
            super().__init__(str(directory / "events"))
        else:
            super().__init__(f"{self._here.name}/events", f".{uuid.uuid4().hex[:8]}")
        self._uploaded = time.monotonic()

    def flush(self) -> bool:
        """Makes what was added durable; in a store, once a minute. Raises OSError where it cannot be written."""
        flushed = super().flush()
        if self._store is not None and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._upload()
            if Path(self._file_name).stat().st_size > _LONGEST:
                super().close()
                self._begin(self._store)
        return flushed

    def close(self) -> bool:
        """Ends the file. Raises OSError where it cannot be written."""
        closed = super().close()
        if self._store is not None:
            self._upload()
            self._here.cleanup()
        return closed

    def _upload(self) -> None:
        file = Path(self._file_name)
        (self._store / file.name).upload(file)
        self._uploaded = time.monotonic()
