#!/usr/bin/env bash
# pydantic 2.14.4: a field of type int takes True for 1, also where the value comes from YAML's `yes` or `on`.
#
# So `layers: yes` is a model of one layer. Whole floats, " 12 " and "1_000" are taken too. One would expect an
# error: pydantic refuses 1.5, "1.0 m" and None for an int, and for a field of type str it refuses both True and
# 1. Strict mode refuses True (and a whole float, and every text).
#
# Seen:
#   yes -> layers=1
#   on -> layers=1
#   12.0 -> layers=12
#   " 12 " -> layers=12
#   "1_000" -> layers=1000
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check pydantic==2.14.4 PyYAML==6.0.4
"$directory/venv/bin/python" - <<'END'
import pydantic
import yaml


class Settings(pydantic.BaseModel):
    layers: int


class Names(pydantic.BaseModel):
    name: str


def refused(model, **values):
    try:
        model(**values)
    except pydantic.ValidationError:
        return True
    return False


for text in ("yes", "on", "12.0", '" 12 "', '"1_000"'):
    print(text, "->", Settings(**yaml.safe_load(f"layers: {text}")))
assert Settings(layers=yaml.safe_load("yes")).layers == 1 and type(Settings(layers=True).layers) is int
assert all(refused(Settings, layers=value) for value in (1.5, "1.0 m", None))
assert refused(Names, name=True) and refused(Names, name=1)
END
