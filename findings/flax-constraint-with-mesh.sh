#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: within `with mesh:`, `nn.with_logical_constraint` does nothing and says nothing;
# JAX's own constraint works there.
#
# `with mesh:` is deprecated but supported: jax.lax.with_sharding_constraint finds the mesh. Flax asks for the
# mesh of jax.set_mesh only, and returns the array as it is if there is none. One would expect both to see the
# same mesh, or a warning from the one that does not: a program from a tutorial runs with all its constraints
# gone.
#
# Seen:
#   with mesh: {'jax': 1, 'flax': 0} with jax.set_mesh(mesh): {'jax': 1, 'flax': 1}
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

import warnings

warnings.simplefilter("ignore", DeprecationWarning)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
FUNCTIONS = {
    "jax": lambda x: jax.lax.with_sharding_constraint(x * 2, jax.sharding.PartitionSpec("data")),
    "flax": lambda x: nn.with_logical_constraint(x * 2, ("rows", None)),
}


def constraints(context):
    with context, nn.logical_axis_rules((("rows", "data"),)):
        return {
            name: jax.jit(lambda x: function(x)).lower(jnp.ones((4, 4))).as_text().count("sharding_constraint")
            for name, function in FUNCTIONS.items()
        }


old, new = constraints(mesh), constraints(jax.set_mesh(mesh))
print("with mesh:", old, "with jax.set_mesh(mesh):", new)
assert (old, new) == ({"jax": 1, "flax": 0}, {"jax": 1, "flax": 1})
END
