#!/usr/bin/env bash
# jax 0.10.2: a `jax.profiler.stop_trace()` that cannot write its files leaves the profiler taken: start_trace is
# refused in the whole process until a stop_trace to the same directory succeeds. jax 0.12.0.1 lets it go.
#
# One would expect the session to be over: its error was about a directory, and the next trace has another one. What
# may not be writable (a full disk, a network drive) is better traced into a temporary directory and copied from there.
#
# Seen:
#   stop_trace: JaxRuntimeError, start_trace elsewhere: Profile has already been started. With the way free,
#   stop_trace: done, start_trace elsewhere: done
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$directory"
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$directory/venv/bin/python" - <<'END'
from pathlib import Path

import jax


def result_of(action, *arguments):
    try:
        action(*arguments)
    except jax.errors.JaxRuntimeError:
        return "JaxRuntimeError"
    except RuntimeError as error:
        return str(error).split(". ")[0]
    return "done"


Path("plugins").write_text("a file where the profiler makes a directory")
jax.profiler.start_trace(".")
failed = result_of(jax.profiler.stop_trace), result_of(jax.profiler.start_trace, "elsewhere")
Path("plugins").unlink()
freed = result_of(jax.profiler.stop_trace), result_of(jax.profiler.start_trace, "elsewhere")
print("stop_trace: {}, start_trace elsewhere: {}.".format(*failed), end=" ")
print("With the way free,\nstop_trace: {}, start_trace elsewhere: {}".format(*freed))
assert failed == ("JaxRuntimeError", "Profile has already been started") and freed == ("done", "done")
END
