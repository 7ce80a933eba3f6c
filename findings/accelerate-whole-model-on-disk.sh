#!/usr/bin/env bash
# accelerate 1.15.0: a model that goes to the disk as a whole, {"": "disk"}, is not written there before it is read.
#
# dispatch_model writes the tensors of each module for the disk to an empty directory. It finds them by the module's
# name and a dot, with which nothing begins where the name is empty, so nothing is written and the index that is read
# next does not exist. With the layers named it works. infer_auto_device_map itself gives the map where nothing fits
# elsewhere, and dispatch_model takes {"": "cpu"}, so one would expect it to take this one.
#
# Seen:
#   {'': 'disk'}: FileNotFoundError of index.json
#   {'': 'cpu'}: runs
#   {'0': 'disk', '1': 'disk'}: runs
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0
"$directory/venv/bin/python" - "$directory" 2>/dev/null <<'END'
import pathlib
import sys

import torch
from accelerate import dispatch_model, infer_auto_device_map


def layers():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))


found = []
inferred = dict(infer_auto_device_map(layers(), {"cpu": 10, "disk": 1000}))
for places in (inferred, {"": "cpu"}, {"0": "disk", "1": "disk"}):
    model = layers()
    x = torch.ones(1, 4)
    expected = model(x)
    folder = pathlib.Path(sys.argv[1], f"offloaded{len(found)}")
    try:
        assert torch.equal(dispatch_model(model, places, offload_dir=str(folder))(x), expected)
        outcome = "runs"
    except FileNotFoundError as error:
        outcome = f"FileNotFoundError of {pathlib.Path(error.filename).name}"
    print(f"{places}: {outcome}")
    found.append(outcome)
assert inferred == {"": "disk"}
assert found == ["FileNotFoundError of index.json", "runs", "runs"]
END
