#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 with jax 0.10.2: a partial restore hands back what the checkpoint lacks as a
# ShapeDtypeStruct among the arrays.
#
# `PyTreeRestore(item, partial_restore=True)` is for restoring fewer arrays than were saved. If `item` asks for
# one that was not saved, its abstract leaf is returned as it is. One would expect an error as without
# partial_restore, since nothing was restored for it: a misspelt parameter gets as far as the first operation that
# needs its numbers.
#
# Seen:
#   {'bais': ShapeDtypeStruct(shape=(2,), dtype=float32), 'kernel': Array([1., 1.], dtype=float32)}
#   without partial_restore: ValueError
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import logging
import tempfile

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)
with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
    manager.save(0, args=ocp.args.PyTreeSave({"kernel": jnp.ones(2), "bias": jnp.zeros(2)}))
    manager.wait_until_finished()
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    wanted = {"kernel": shape, "bais": shape}
    restored = manager.restore(0, args=ocp.args.PyTreeRestore(wanted, partial_restore=True))
    print(restored)
    assert isinstance(restored["kernel"], jax.Array) and restored["bais"] == shape
    try:
        manager.restore(0, args=ocp.args.PyTreeRestore(wanted))
    except ValueError as error:
        print("without partial_restore:", type(error).__name__)
    else:
        raise AssertionError("restored")
END
