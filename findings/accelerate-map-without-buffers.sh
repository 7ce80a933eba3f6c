#!/usr/bin/env bash
# accelerate 1.15.0: infer_auto_device_map leaves out the buffers of a sub-module that it splits; the map is refused.
#
# A sub-module that does not fit a device is split: its own parameters and its sub-modules get a device each. Its own
# buffers get none, and dispatch_model, given the map as it came, says that one is missing. One would expect a buffer to
# be placed as a parameter is, or at least a map that dispatch_model takes.
#
# Seen:
#   parameter: {'0.own': 'cpu', '0.first': 'cpu', '0.second': 'disk', '0.third': 'disk'}
#     runs
#   buffer: {'0.first': 'cpu', '0.second': 'disk', '0.third': 'disk'}
#     The device_map provided does not give any device for the following parameters: 0.own
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0
"$directory/venv/bin/python" - "$directory" 2>/dev/null <<'END'
import sys

import torch
from accelerate import dispatch_model, infer_auto_device_map


class Block(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        if kind == "buffer":
            self.register_buffer("own", torch.ones(4))
        else:
            self.own = torch.nn.Parameter(torch.ones(4))
        self.first, self.second, self.third = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.third(self.second(self.first(x) * self.own))


for kind in ("parameter", "buffer"):
    model = torch.nn.Sequential(Block(kind))
    assert "0.own" in model.state_dict()
    places = dict(infer_auto_device_map(model, {"cpu": 200, "disk": 1000}))
    try:
        dispatch_model(model, places, offload_dir=f"{sys.argv[1]}/{kind}")(torch.ones(1, 4))
        outcome = "runs"
    except ValueError as error:
        outcome = str(error)
    print(f"{kind}: {places}\n  {outcome}")
    assert list(places) == ["0.own"] * (kind == "parameter") + ["0.first", "0.second", "0.third"]
    assert outcome.endswith("runs" if kind == "parameter" else "any device for the following parameters: 0.own")
END
