#!/usr/bin/env bash
# jax 0.10.2: within `jax.set_mesh(mesh)`, a jitted function refuses an array that is committed to one device of
# the mesh, though the function mentions no mesh; so does plain indexing, which is jitted inside.
#
# One would expect a function without shardings to run where its arguments are, as it does outside. A checkpoint
# that is restored onto one device, to be checked or converted before it is spread, cannot be touched any more (a
# checksum, a norm, a row) once the program's mesh is set. A mesh of that one device, set around the call, helps.
#
# Seen:
#   no mesh: 6.0, mesh: ValueError: Received incompatible devices, array[0] in mesh: ValueError: Received incompatible
#   devices, one-device mesh within: 6.0
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
import jax
import jax.numpy as jnp

auto = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((2,), ("data",), axis_types=auto)
one = jax.make_mesh((1,), ("data",), axis_types=auto, devices=jax.devices()[:1])
array = jax.device_put(jnp.arange(4.0), jax.devices()[0])
total = jax.jit(jnp.sum)

REFUSED = "ValueError: Received incompatible devices"


def result_of(action):
    try:
        return float(action())
    except ValueError as error:
        return f"ValueError: {' '.join(str(error).split()[:3])}"


outside = result_of(lambda: total(array))
with jax.set_mesh(mesh):
    jitted, row = result_of(lambda: total(array)), result_of(lambda: array[0])
    with jax.set_mesh(one):
        within = result_of(lambda: total(array))
print(f"no mesh: {outside}, mesh: {jitted}, array[0] in mesh: {row}, one-device mesh within: {within}")
assert (outside, jitted, row, within) == (6.0, REFUSED, REFUSED, 6.0)
END
