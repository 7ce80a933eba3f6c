#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: `safetensors.numpy.save_file` writes other numbers than it is given for an
# array that is not C-contiguous, without an error or a warning.
#
# It writes the array's shape beside the bytes of its buffer, in the order in which they lie in memory. A
# transposed array comes back with the numbers of its base in the shape of its transpose; so does an array in
# Fortran order, and a slice comes back with its neighbours' numbers. One would expect the values that numpy
# shows, or an error: np.save, pickle and `safetensors.flax` keep them, and `safetensors.torch` refuses such
# tensors. np.ascontiguousarray before saving avoids it.
#
# Seen:
#   transposed saved [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] loaded [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   every second saved [[0.0, 2.0], [3.0, 5.0]] loaded [[0.0, 1.0], [2.0, 3.0]]
#   Fortran order saved [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] loaded [[0.0, 3.0, 1.0], [4.0, 2.0, 5.0]]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$directory/venv/bin/python" - <<'END'
import numpy as np
from safetensors.numpy import load, save

matrix = np.arange(6.0).reshape(2, 3)
arrays = {"transposed": matrix.T, "every second": matrix[:, ::2], "Fortran order": np.asfortranarray(matrix)}
loaded = load(save(arrays))
for name, array in arrays.items():
    print(name, "saved", array.tolist(), "loaded", loaded[name].tolist())
    assert loaded[name].shape == array.shape and not np.array_equal(loaded[name], array)
assert np.array_equal(load(save({"copy": np.ascontiguousarray(matrix.T)}))["copy"], matrix.T)
END
