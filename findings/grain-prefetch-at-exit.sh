#!/usr/bin/env bash
# grain 0.2.18 on Python 3.11: a program that ends while it holds an iterator of ThreadPrefetchIterDataset prints
# an exception.
#
# The iterator's __del__ closes it when the interpreter has already cleared grain's modules, and finds `queue` to
# be None. The exit status stays 0. One would expect a five-line program that reads one element to end silently.
# Closing the iterator first, or at exit by weakref.finalize, avoids it.
#
# Seen:
#   left alone exit status 0 AttributeError: 'NoneType' object has no attribute 'Empty'
#   closed exit status 0 []
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check grain==0.2.18 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import subprocess
import sys

PROGRAM = """
import grain
numbers = grain.MapDataset.range(10).to_iter_dataset()
iterator = iter(grain.experimental.ThreadPrefetchIterDataset(numbers, prefetch_buffer_size=2))
print(next(iterator))
"""
for name, end, noisy in (("left alone", "", True), ("closed", "iterator.close(); del iterator", False)):
    done = subprocess.run([sys.executable, "-c", PROGRAM + end], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("Exception", "AttributeError"))]
    print(name, "exit status", done.returncode, errors and errors[-1])
    assert done.returncode == 0 and ("Exception ignored in" in done.stderr) == noisy, done.stderr
END
