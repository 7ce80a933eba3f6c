#!/usr/bin/env bash
# jax 0.10.2 on CPUs: `jax.lax.all_gather` over a mesh axis of one device stays in the program, and copies the array.
#
# The replica groups say {{0}}, so the result is the operand; one would expect the compiler to drop it, as it drops
# transposes and reshapes that change nothing. A program that is written for a mesh and runs on one device pays a copy of
# every gathered weight, and another one for its gradient: `psum_scatter` stays as well.
#
# Seen:
#   all_gather over one device: 1 all-gather in the compiled program
#   psum_scatter over one device: 1 reduce-scatter in the compiled program
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$directory/venv/bin/python" - <<'END'
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,))


def compiled(collective):
    mapped = jax.shard_map(
        lambda array: jnp.sin(collective(array, "x", tiled=True)),
        mesh=mesh,
        in_specs=PartitionSpec("x"),
        out_specs=PartitionSpec("x"),
        check_vma=False,
    )
    return jax.jit(mapped).lower(jnp.ones((1024, 64))).compile().as_text()


gathers = len(re.findall(r" all-gather\(", compiled(jax.lax.all_gather)))
scatters = len(re.findall(r" reduce-scatter\(", compiled(jax.lax.psum_scatter)))
print(f"all_gather over one device: {gathers} all-gather in the compiled program")
print(f"psum_scatter over one device: {scatters} reduce-scatter in the compiled program")
raise SystemExit((gathers, scatters) != (1, 1))
END
