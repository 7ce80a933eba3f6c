"""A run's TensorBoard file."""

from __future__ import annotations

from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from lm2_jax.common.records import Record, drawable


class Board(EventsWriter):
    """A TensorBoard file, written by the calling thread.

    SummaryWriter's own thread dies on a full disk, and the next write waits for it forever.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        directory.mkdir(exist_ok=True)
        super().__init__(str(directory / "events"))
        # TensorBoard drops what an earlier process wrote of this step and later ones
        self.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, record: Record) -> None:
        """Adds the numbers of a record, at its step and time."""
        event = Event(step=record["step"], wall_time=record["time"])
        event.summary.value.extend(scalar(key, value).value[0] for key, value in drawable(record).items())
        self.write_event(event)
