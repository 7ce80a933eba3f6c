#!/usr/bin/env bash
# jax 0.10.2 (XLA for CPU): `compiled.cost_analysis()` counts the body of a loop once, however often it runs.
#
# A scan over 100 products is reported with the operations of one; unrolled by five it is five. One would expect
# operations of a run of the program, as without a loop: utilisation computed from it is low by the number of
# layers, segments or microbatches that are scanned.
#
# Seen:
#   products: {'ten in a row': 10, 'scan of 10': 1, 'scan of 100': 1, 'scan of 100 by 5': 5}
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp

w = jnp.ones((64, 64))


def flops(function):
    return jax.jit(function).lower(w).compile().cost_analysis()["flops"]


def scan(length, unroll=1):
    return lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=length, unroll=unroll)[0]


def chain(x):
    for _ in range(10):
        x = x @ w
    return x


one = 2 * 64**3
found = {"ten in a row": chain, "scan of 10": scan(10), "scan of 100": scan(100), "scan of 100 by 5": scan(100, 5)}
found = {name: round(flops(function) / one) for name, function in found.items()}
print("products:", found)
assert list(found.values()) == [10, 1, 1, 5]
END
