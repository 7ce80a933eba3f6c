"""Errors that are the user's to correct, and how a command ends on one."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType


class UserError(Exception):
    """An error that the user can correct: names the file, the key, the value found, and what would be right.

    Commands print it without a traceback and exit with code 2.
    """


class TrainingFailed(Exception):
    """A run that cannot continue (for example, too many non-finite steps). Printed without a traceback; exit code 1."""


@contextlib.contextmanager
def store_failures() -> Iterator[None]:
    """Turns failures of an object store that nobody expected there into UserError (no bucket, no permission) or
    TrainingFailed (the network).
    """
    try:
        yield
    except OSError as error:
        if "://" not in str(error.filename):
            raise
        known = FileNotFoundError, PermissionError
        kind = UserError if isinstance(error, known) else TrainingFailed
        raise kind(f"{error.filename}: {error.strerror}") from error


@functools.cache
def warn_once(message: str) -> None:
    """Prints a warning, once in each process."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def run_command(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a command's `main` and turns errors into exit codes: 2 the user's, 1 ours, 130 interrupted.

    interrupted: message on Ctrl-C, such as how to resume.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:  # an import may swallow the exception, or print a traceback of its own
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, f"{interrupted}\n".encode())
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        with store_failures():
            main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message, for a message of our own."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no details'}"
