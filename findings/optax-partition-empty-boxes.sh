#!/usr/bin/env bash
# optax 0.2.8 with flax 0.12.8: after `optax.partition` of boxed parameters, `nn.get_partition_spec` lists specs
# for arrays that are not in the state.
#
# With labels made by a tree_map over the parameters, the parameters of the other optimizer become
# LogicallyPartitioned boxes around an empty MaskedNode. Their axis names are still there, so each gives a
# PartitionSpec, while the state has no array for it. One would expect the tree of specs to match the tree of
# arrays, as it does for an optimizer that is not partitioned; here a tree_map over both raises ValueError.
#
# Seen:
#   whole arrays 4 specs 4 trees match True
#   partition arrays 2 specs 4 trees match False
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

params = {name: nn.LogicallyPartitioned(jnp.ones((2, 2)), ("rows", "columns")) for name in ("a", "b")}
labels = jax.tree_util.tree_map_with_path(lambda path, _: "adam" if path[0].key == "a" else "sgd", params)
optimizers = {"whole": optax.adam(0.1), "partition": optax.partition({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, labels)}
for name, optimizer in optimizers.items():
    state = optimizer.init(params)
    specs = nn.get_partition_spec(state)
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
    named = sum(spec == jax.sharding.PartitionSpec("rows", "columns") for spec in jax.tree.leaves(specs, is_leaf=is_spec))
    arrays = sum(x.ndim == 2 for x in jax.tree.leaves(state))
    try:
        jax.tree.map(lambda array, spec: None, nn.meta.unbox(state), specs)
        matches = True
    except ValueError:
        matches = False
    print(name, "arrays", arrays, "specs", named, "trees match", matches)
    assert (named == arrays, matches) == ((True, True) if name == "whole" else (False, False))
END
