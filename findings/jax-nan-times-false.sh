#!/usr/bin/env bash
# jax 0.10.2 (XLA for CPU): NaN times False is 0, and NaN times 0.0 is NaN; so `x * mask.astype(x.dtype)` gives
# one thing inside jit and another outside.
#
# XLA turns a product with a converted boolean into a choice between x and 0, within one compiled program. Outside
# of jit the cast is a program of its own, and the product sees a float. One would expect the same numbers with
# and without jit, and numpy's. A mask multiplied in so looks as if it could hide NaN (a test passes), until its
# cast moves to another program: use jnp.where.
#
# Seen:
#   numpy, x * mask [nan  1. nan]
#   x * mask [0. 1. 0.]
#   x * mask.astype [nan  1. nan]
#   jit(x * mask.astype) [0. 1. 0.]
#   jit(x * mask), mask cast outside [nan  1. nan]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import warnings

import jax
import jax.numpy as jnp
import numpy as np

warnings.simplefilter("ignore", RuntimeWarning)
x, mask = jnp.array([jnp.nan, 1, jnp.inf]), jnp.array([False, True, False])
as_float = lambda x, mask: x * mask.astype(x.dtype)
found = {
    "numpy, x * mask": np.asarray(x) * np.asarray(mask),
    "x * mask": x * mask,
    "x * mask.astype": as_float(x, mask),
    "jit(x * mask.astype)": jax.jit(as_float)(x, mask),
    "jit(x * mask), mask cast outside": jax.jit(jnp.multiply)(x, mask.astype(x.dtype)),
}
for name, product in found.items():
    print(name, product)
assert [bool(np.isnan(product[0])) for product in found.values()] == [True, False, True, False, True]
END
