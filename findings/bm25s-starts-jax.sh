#!/usr/bin/env bash
# bm25s 0.3.16: `import bm25s` starts JAX's backend, where JAX is installed.
#
# The package ranks with NumPy and requires nothing else, but its module `selection` tries `jax.lax.top_k` once while it
# is imported. From then on JAX's platform is chosen: `jax.distributed.initialize` refuses, and so a program of several
# processes must not import bm25s, or anything that does, before it has joined the others.
#
# Seen (jax 0.10.2):
#   backend started by the import: True
#   initialize: RuntimeError
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 bm25s==0.3.16
JAX_PLATFORMS=cpu "$directory/venv/bin/python" - <<'END'
import jax
from jax._src import xla_bridge

assert not xla_bridge.backends_are_initialized()
import bm25s

started = xla_bridge.backends_are_initialized()
print(f"backend started by the import: {started}")
try:
    jax.distributed.initialize("localhost:12345", num_processes=1, process_id=0)
    error = None
except RuntimeError as raised:
    error = type(raised).__name__
print(f"initialize: {error}")
raise SystemExit(not (started and error == "RuntimeError"))
END
