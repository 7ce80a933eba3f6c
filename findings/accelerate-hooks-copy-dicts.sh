#!/usr/bin/env bash
# accelerate 1.15.0: a module with a hook gets copies of the dicts and lists it is called with.
#
# The hook that dispatch_model puts on modules moves tensors among the arguments to the module's device. For that it
# builds each dict, list or tuple anew, also if nothing has to move. What a module writes into a dict of its caller, as
# into a cache, goes into the copy and is lost. One would expect a container whose tensors are all in place to be handed
# on as it is, or a word on this in the documentation of dispatch_model. Other objects are handed on.
#
# Seen:
#   without a hook: dict {'calls': 1}, list [1], object {'calls': 1}
#   with a hook: dict {}, list [], object {'calls': 1}
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0
"$directory/venv/bin/python" - 2>/dev/null <<'END'
import types

import torch
from accelerate import dispatch_model


class Counter(torch.nn.Linear):
    def forward(self, x, filled, numbers, own):
        filled["calls"] = own.calls = len(numbers) + 1
        numbers.append(1)
        return super().forward(x)


found = {}
for name in ("without", "with"):
    module = Counter(1, 1)
    if name == "with":
        dispatch_model(module, {"": "cpu"}, main_device="cpu", force_hooks=True)
    filled, numbers, own = {}, [], types.SimpleNamespace()
    module(torch.ones(1, 1), filled, numbers, own=own)
    found[name] = (filled, numbers, vars(own))
    print(f"{name} a hook: dict {filled}, list {numbers}, object {vars(own)}")
assert found["without"] == ({"calls": 1}, [1], {"calls": 1})
assert found["with"] == ({}, [], {"calls": 1})
END
