#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 with jax 0.10.2: `PyTreeRestore(item)` does not look at the shapes and dtypes in `item`;
# `StandardRestore(item)` does.
#
# Both are given the same tree of ShapeDtypeStructs. StandardRestore refuses another shape and casts to the dtype;
# PyTreeRestore returns the saved shape and dtype, unless the same tree is passed a second time through
# `construct_restore_args`, with shardings. One would expect both to read `item` the same way: a checkpoint of
# another model size is restored without a word.
#
# Seen:
#   asked for (5,) bfloat16 got (3,) float32
#   StandardRestore refuses: Requested shape: (5,) is not compatible with the stored shape: (3,). Tru
#   PyTreeRestore with restore_args refuses: Requested shape: (5,) is not compatible with the stored shape: (3,). Tru
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
with ocp.CheckpointManager(tempfile.mkdtemp(), item_names=("tree", "standard")) as manager:
    state = {"a": jnp.ones(3)}
    both = ocp.args.Composite(tree=ocp.args.PyTreeSave(state), standard=ocp.args.StandardSave(state))
    manager.save(0, args=both)
    manager.wait_until_finished()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = {"a": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=here)}
    found = manager.restore(0, args=ocp.args.Composite(tree=ocp.args.PyTreeRestore(item))).tree["a"]
    print("asked for", item["a"].shape, item["a"].dtype, "got", found.shape, found.dtype)
    assert (found.shape, found.dtype) == ((3,), jnp.float32)
    refused = {
        "StandardRestore": ocp.args.Composite(standard=ocp.args.StandardRestore(item)),
        "PyTreeRestore with restore_args": ocp.args.Composite(
            tree=ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        ),
    }
    for name, args in refused.items():
        try:
            manager.restore(0, args=args)
        except ValueError as error:
            print(name, "refuses:", str(error)[:72])
        else:
            raise AssertionError(name)
END
