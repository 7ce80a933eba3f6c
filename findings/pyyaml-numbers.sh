#!/usr/bin/env bash
# PyYAML 6.0.4: 3e-4 is a string, 0100 is 64, 1:30 is 90 and 1:30:00 is 5400.
#
# It follows YAML 1.1: a float needs a dot and its exponent a sign, a leading 0 means octal, and colons mean base
# 60. One would expect JSON's numbers at least (YAML 1.2, of 2009, reads all of JSON) and a text for what holds
# colons. A learning rate of 3e-4 arrives as text where nothing converts it, and a seed of 0100 is another seed.
#
# Seen:
#   {'3e-4': '3e-4', '3.0e-4': 0.0003, '1.5e3': '1.5e3', '1.5e+3': 1500.0, '0100': 64, '08': '08', '1:30': 90, '1:30:00': 5400}
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check PyYAML==6.0.4
"$directory/venv/bin/python" - <<'END'
import json

import yaml

found = {text: yaml.safe_load(text) for text in ("3e-4", "3.0e-4", "1.5e3", "1.5e+3", "0100", "08", "1:30", "1:30:00")}
print(found)
assert found == {
    "3e-4": "3e-4", "3.0e-4": 3e-4, "1.5e3": "1.5e3", "1.5e+3": 1500.0, "0100": 64, "08": "08", "1:30": 90, "1:30:00": 5400
}
assert json.loads("3e-4") == 3e-4
END
