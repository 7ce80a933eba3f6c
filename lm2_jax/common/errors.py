"""Errors that are the user's to mend, and how a command ends on one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right: names the file, the key, the value found, and what would be right.

    Commands print it without a traceback and exit with code 2.
    """


class TrainingFailed(Exception):
    """A run that cannot go on (for example, too many non-finite steps). Printed without a traceback; exit code 1."""


def run_command(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a command's `main` and turns its errors into exit codes: 2 the user's, 1 ours, 130 interrupted.

    interrupted: what Ctrl-C makes it say, such as how to go on.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `command_line.before_imports` leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
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
