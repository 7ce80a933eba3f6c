#!/usr/bin/env bash
# optax 0.2.6 and 0.2.8: `optax.contrib.scale_by_muon` takes steps of another size for wide matrices.
#
# Up to 0.2.6 it multiplies the orthogonal step of a matrix [in, out] by sqrt(max(1, out / in)) itself; in 0.2.8 only
# the optimizer `muon` around it does something of the kind. Neither its arguments nor its state have changed, so a run
# that resumes with the other version goes on with another learning rate for some of its matrices, without a word.
#
# Seen (norm of the step of a matrix [8, 32] over that of its transpose):
#   optax 0.2.6: 2.00
#   optax 0.2.8: 1.00
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
pip=("$directory/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$directory/step.py" <<'END'
import sys

import jax
import jax.numpy as jnp
import optax
import optax.contrib

gradient = jax.random.normal(jax.random.key(0), (8, 32))
axes = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
muon = optax.contrib.scale_by_muon(weight_dimension_numbers=axes)


def size(gradient):
    return jnp.linalg.norm(muon.update(gradient, muon.init(gradient))[0])


ratio = float(size(gradient) / size(gradient.T))
print(f"optax {optax.__version__}: {ratio:.2f}")
raise SystemExit(abs(ratio - float(sys.argv[1])) > 0.01)
END
for expected in "0.2.6 2" "0.2.8 1"; do
    read -r version ratio <<< "$expected"
    "${pip[@]}" "optax==$version"
    JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/step.py" "$ratio"
done
