#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: `nn.meta.unbox` is no mere accessor: under a mesh it constrains the sharding of
# what it unboxes, and outside of jit it may raise TypeError for that.
#
# A LogicallyPartitioned box's unbox() calls with_logical_constraint. Parameters that lie on one device cannot be
# unboxed under jax.set_mesh, and inside jit each unboxing adds an op that decides where the array lies. One would
# expect the opposite of boxing: `box.value`, which is what a tree_map over the boxes gives.
#
# Seen:
#   without a mesh: {'kernel': (4, 4)}
#   under a mesh, constraints of nn.meta.unbox: 1 of .value: 0
#   TypeError: The sharding on the input must be a `NamedSharding` since the target sharding has an `AbstractMesh` in it. Got
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

boxed = {"kernel": nn.LogicallyPartitioned(jnp.ones((4, 4)), ("rows", None))}
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def constraints(unbox):
    return jax.jit(lambda tree: unbox(tree)).lower(boxed).as_text().count("sharding_constraint")


def values(tree):
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree.map(lambda x: x.value, tree, is_leaf=is_box)


print("without a mesh:", jax.tree.map(jnp.shape, nn.meta.unbox(boxed)))
with jax.set_mesh(mesh), nn.logical_axis_rules((("rows", "data"),)):
    print("under a mesh, constraints of nn.meta.unbox:", constraints(nn.meta.unbox), "of .value:", constraints(values))
    assert (constraints(nn.meta.unbox), constraints(values)) == (1, 0)
    try:
        nn.meta.unbox(boxed)
    except TypeError as error:
        print("TypeError:", str(error)[:110])
    else:
        raise AssertionError("unboxed")
END
