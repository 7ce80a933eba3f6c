"""Progress of long work, in words."""

from __future__ import annotations

import time
from collections.abc import Callable


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


class Progress:
    """Reports progress, and the time that the rest takes at the average rate so far.

    Args:
      log: receives the lines.
      total: all work, in a unit whose cost is about constant.
      interval: seconds between two lines at least; the end of the work is always reported.
    """

    def __init__(self, log: Callable[[str], None], total: float, interval: float = 0.0) -> None:
        self._log, self._total, self._interval = log, total, interval
        self._started, self._reported = time.monotonic(), 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def report(self, done: float, text: str) -> None:
        """Logs `text` and the time left, where `done` of the total is done."""
        elapsed = self.elapsed
        if elapsed - self._reported < self._interval and done < self._total:
            return
        self._reported = elapsed
        self._log(f"{text}, {clock(elapsed / done * (self._total - done))} left")
