#!/usr/bin/env bash
# wandb 0.31.0: a run that is resumed offline begins at step 0 again, whatever `resume` says; a step below the last is
# dropped.
#
# `wandb.init(id=..., resume="must", mode="offline")` is to fail if there is no such run, and to go on with it if there
# is. Offline it does neither, with or without the files of the run at hand: `run.step` is 0 and `run.resumed` False, so
# that a program that counts by `run.step`, or lets wandb count, numbers its records anew. And `run.log(..., step=3)` after
# step 5, as in a run that goes on from a checkpoint, leaves the record out, with a warning on standard error alone.
#
# Seen:
#   first start: step 0, resumed False
#   resumed with must: step 0, resumed False
#   another id with must: step 0, resumed False
#   after steps 5 and 3 the summary has the loss of step 5: True
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
cd "$directory"
"$directory/venv/bin/python" - <<'END'
import wandb


def start(what, **options):
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(project="p", mode="offline", settings=settings, **options)
    print(f"{what}: step {run.step}, resumed {run.resumed}")
    assert (run.step, run.resumed) == (0, False)
    return run


with start("first start", id="one", resume="allow") as run:
    for step in range(6):
        run.log({"loss": 1.0}, step=step)
with start("resumed with must", id="one", resume="must"):
    pass
with start("another id with must", id="another", resume="must") as run:
    run.log({"loss": 5.0}, step=5)
    run.log({"loss": 3.0}, step=3)
    run.log({"other": 0.0}, step=6)
    kept = run.summary["loss"] == 5.0
    print("after steps 5 and 3 the summary has the loss of step 5:", kept)
    assert kept
END
