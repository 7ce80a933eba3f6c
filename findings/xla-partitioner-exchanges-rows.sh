#!/usr/bin/env bash
# jax 0.10.2 (XLA for CPU, 8 host devices): a sharded `x @ w` on a 2 x 2 x 2 mesh comes out with its rows in
# another order.
#
# x is sharded P((data, fsdp), None, tensor), w P(tensor, fsdp) and the result P((data, fsdp), None, tensor): the
# layouts of a Llama with data, FSDP and tensor parallelism. Rows 1 and 2 of 4 are exchanged, exactly and without
# a warning. It is right with another result sharding, and on meshes that lack one of the axes. Layouts change
# where numbers lie and never what they are, one would say. Seen as soon as a device's part of x is no larger than
# its part of w, that is with few tokens a device.
#
# Seen:
#   2 x 2 x 2 [0, 2, 1, 3]
#   2 x 2 x 2, result in rows [0, 1, 2, 3]
#   4 x 1 x 2 [0, 1, 2, 3]
#   1 x 4 x 2 [0, 1, 2, 3]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

x = np.random.default_rng(0).normal(size=(4, 1, 64)).astype(np.float32)
w = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)


def order(sizes, result):
    """For each row of the result the row of x @ w that it holds."""
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))
    product = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, result))
    found = np.asarray(product(put(x, ("data", "fsdp"), None, "tensor"), put(w, "tensor", "fsdp")))
    return [next((i for i, row in enumerate(x @ w) if np.allclose(row, one, atol=1e-4)), None) for one in found]


sharded = P(("data", "fsdp"), None, "tensor")
found = {
    "2 x 2 x 2": order((2, 2, 2), sharded),
    "2 x 2 x 2, result in rows": order((2, 2, 2), P(("data", "fsdp"))),
    "4 x 1 x 2": order((4, 1, 2), sharded),
    "1 x 4 x 2": order((1, 4, 2), sharded),
}
for name, rows in found.items():
    print(name, rows)
assert found.pop("2 x 2 x 2") == [0, 2, 1, 3]
assert all(rows == [0, 1, 2, 3] for rows in found.values())
END
