#!/usr/bin/env bash
# optax 0.2.8 with jax 0.10.2: `softmax_cross_entropy_with_integer_labels` takes the label -1 for the last class,
# and -100 for NaN.
#
# Both are habitual marks of positions to be ignored (-100 is PyTorch's default). Labels are looked up as numpy
# would: -V to -1 count from the end, and everything beyond is NaN, which multiplied by a weight of 0 is still
# NaN. One would expect one treatment of all labels that are no class. Put jnp.where around labels and losses.
#
# Seen:
#   2: 0.408, -1: 0.408, -3: 2.408, -4: nan, -100: nan, 3: nan
#   sum of the first one by weights 1 and 0: nan
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
import optax

labels = jnp.array([2, -1, -3, -4, -100, 3])
losses = optax.softmax_cross_entropy_with_integer_labels(jnp.array([[1.0, 2.0, 3.0]] * len(labels)), labels)
print(", ".join(f"{label}: {loss:.3f}" for label, loss in zip(labels.tolist(), losses.tolist())))
assert losses[1] == losses[0] and np.isfinite(losses[2]) and np.isnan(losses[3:]).all()
weights = np.where(labels == 2, np.float32(1), np.float32(0))
total = jnp.sum(losses * weights)
print("sum of the first one by weights 1 and 0:", total)
assert np.isnan(total)
END
