#!/usr/bin/env bash
# jax 0.10.2: an array whose last axis lies along two mesh axes, and which is to lie along one of them in its first axis
# and along the other in its second, is gathered whole on every device. Moved in two steps, it is hardly sent at all.
#
# Asked for at once, XLA's partitioner warns of an "involuntary full rematerialization" and gathers; one would expect it
# to find the two exchanges by itself, since each of them is one that it knows. An intermediate constraint, which changes
# no value, is all it needs. A table that is sharded over its width, looked up for tokens that are sharded over lanes and
# positions, is such an array.
#
# Seen, on 2 x 4 devices:
#   at once: all-gather of 4096 numbers
#   in two steps: no array is gathered
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$directory/venv/bin/python" - 2>/dev/null <<'END'
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
along_both, step, wanted = (
    NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, None, ("a", "b")), ("a", None, "b"), ("a", "b"))
)


def gathered(*layouts):
    def move(x):
        for layout in layouts:
            x = jax.lax.with_sharding_constraint(x, layout)
        return 2 * x

    x = jax.ShapeDtypeStruct((2, 32, 64), jnp.float32, sharding=along_both)
    text = jax.jit(move, out_shardings=wanted).lower(x).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


at_once, in_steps = gathered(wanted), gathered(step, wanted)
print(f"at once: all-gather of {', '.join(map(str, at_once))} numbers")
print("in two steps: " + (f"all-gather of {in_steps} numbers" if in_steps else "no array is gathered"))
raise SystemExit((at_once, in_steps) != ([2 * 32 * 64], []))
END
