#!/usr/bin/env bash
# jax 0.10.2: in `jax.nn.dot_product_attention` a query whose mask allows no key gets the mean of all values,
# those of forbidden keys included.
#
# Masked scores are set to a large negative number, the same for all, so the softmax of such a row is uniform. A
# padding query thus reads every token of its row, and so do gradients. One would expect zeros, as PyTorch's
# scaled_dot_product_attention gives, or NaN, as a softmax over minus infinity does: neither carries numbers across
# a mask.
#
# Seen:
#   values 0, 1, 5; queries allowed no key, key 0, key 0: [2. 0. 0.]
#   gradient to the values: 2.33 0.33 0.33
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
import numpy as np

q_BTHK = k_BTHK = jax.random.normal(jax.random.key(0), (1, 3, 1, 4))
v_BTHK = jnp.array([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1) * jnp.ones(4)
mask = jnp.array([[False, False, False], [True, False, False], [True, False, False]])[None, None]
found = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=mask)[0, :, 0, 0]
print("values 0, 1, 5; queries allowed no key, key 0, key 0:", found)
np.testing.assert_allclose(found, [2, 0, 0], atol=1e-6)
gradient = jax.grad(lambda v: jax.nn.dot_product_attention(q_BTHK, k_BTHK, v, mask=mask).sum())(v_BTHK)[0, :, 0, 0]
print("gradient to the values:", *(f"{x:.2f}" for x in gradient))
assert (gradient > 0.3).all()
END
