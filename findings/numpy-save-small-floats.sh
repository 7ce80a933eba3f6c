#!/usr/bin/env bash
# numpy 2.4.6 with ml_dtypes 0.6.0: np.save writes arrays of bfloat16 and float8 whose dtype np.load does not give
# back; float8_e5m2 it cannot read at all.
#
# The file's header holds the dtype's `str`. That of bfloat16 is "|V2": two bytes, and no more is said; of
# float8_e4m3fn "|V1"; of float8_e5m2 "<f1", which np.load refuses. One would expect the dtype back, or an error
# when saving: arrays of JAX pass through np.asarray into such files. The bytes are whole:
# `loaded.view(ml_dtypes.bfloat16)` has the numbers.
#
# Seen:
#   saved bfloat16 loaded dtype('V2')
#   saved float8_e4m3fn loaded dtype('V1')
#   saved float8_e5m2 ValueError: descr is not a valid dtype descriptor: '<f1'
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
"$directory/venv/bin/python" - <<'END'
import io

import ml_dtypes
import numpy as np


def through_a_file(array):
    file = io.BytesIO()
    np.save(file, array)
    file.seek(0)
    try:
        return np.load(file)
    except ValueError as error:
        return error


for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
    saved = np.array([1, 1.5], dtype)
    loaded = through_a_file(saved)
    if dtype == ml_dtypes.float8_e5m2:
        print("saved", saved.dtype, "ValueError:", loaded)
        assert isinstance(loaded, ValueError)
    else:
        print("saved", saved.dtype, "loaded", repr(loaded.dtype))
        assert loaded.dtype.kind == "V" and np.array_equal(loaded.view(dtype), saved)
END
