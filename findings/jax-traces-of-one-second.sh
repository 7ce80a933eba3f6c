#!/usr/bin/env bash
# jax 0.10.2: of two traces that end within the same second, only the later is left.
#
# `jax.profiler.stop_trace` writes to LOGDIR/plugins/profile/YEAR_MONTH_DAY_HOUR_MINUTE_SECOND/HOST.xplane.pb, in local
# time, and overwrites what is there without a word. One would expect two traces in two directories, or an error: two
# processes on one machine that trace the same steps into one log directory lose one of the two as well.
# `ProfileOptions.session_id` gives a trace a directory of its own.
#
# Seen:
#   two traces: 1 directory, with the later trace: True
#   two traces with names: ['first', 'second']
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$directory/venv/bin/python" - <<'END'
import tempfile
import time
from pathlib import Path

import jax


def trace(directory, annotation, name=None):
    options = jax.profiler.ProfileOptions()
    if name:
        options.session_id = name
    jax.profiler.start_trace(directory, profiler_options=options)
    with jax.profiler.TraceAnnotation(annotation):
        pass
    jax.profiler.stop_trace()


def sessions(directory):
    return sorted((directory / "plugins" / "profile").iterdir())


trace(Path(tempfile.mkdtemp()), "warm up")
for _ in range(20):  # until both lie within a second, also on a busy machine
    directory, second = Path(tempfile.mkdtemp()), int(time.time() + 1)
    time.sleep(second - time.time())
    for annotation in ("the earlier", "the later"):
        trace(directory, annotation)
    if int(time.time()) == second:
        break
found = sessions(directory)
(file,) = found[0].glob("*.xplane.pb")
later = b"the later" in file.read_bytes() and b"the earlier" not in file.read_bytes()
print(f"two traces: {len(found)} directory, with the later trace: {later}")
assert len(found) == 1 and later
directory = Path(tempfile.mkdtemp())
for name in ("first", "second"):
    trace(directory, name, name)
names = [session.name for session in sessions(directory)]
print("two traces with names:", names)
assert names == ["first", "second"]
END
