#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: a logical axis name that no rule mentions is taken for "whole on every device", in
# silence.
#
# nn.with_logical_constraint with a misspelt name gathers the array on all devices, instead of leaving it where it
# is: the constraint undoes a sharding that would have been there without it. One would expect an error, or no
# constraint on that axis; a mesh axis that does not exist is an error. The numbers are right and only memory and
# traffic show it.
#
# Seen:
#   no constraint -> P('data',) a device holds (2, 4)
#   rows -> P('data',) a device holds (2, 4)
#   rosw -> P() a device holds (4, 4)
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
import jax
import jax.numpy as jnp
from flax import linen as nn

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.ones((4, 4)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
found = {}
with jax.set_mesh(mesh), nn.logical_axis_rules((("rows", "data"),)):
    found["no constraint"] = jax.jit(lambda x: x * 2)(x)
    for name in ("rows", "rosw"):
        found[name] = jax.jit(lambda x: nn.with_logical_constraint(x * 2, (name, None)))(x)
for name, y in found.items():
    print(name, "->", y.sharding.spec, "a device holds", y.addressable_shards[0].data.shape)
assert [y.addressable_shards[0].data.shape for y in found.values()] == [(2, 4), (2, 4), (4, 4)]
END
