#!/usr/bin/env bash
# wandb 0.31.0: a run that is resumed offline begins at step 0 again, whatever `resume` says.
#
# `wandb.init(id=..., resume="must", mode="offline")` is to fail if there is no such run, and to go on with it if there
# is. Offline it does neither, with or without the files of the run at hand: `run.step` is 0 and `run.resumed` False, so
# that a program that counts by `run.step`, or lets wandb count, numbers its records anew. One would expect an error, or
# the step that the files hold.
#
# Seen:
#   first start: step 0, resumed False
#   resumed with must: step 0, resumed False
#   another id with must: step 0, resumed False
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
cd "$directory"
"$directory/venv/bin/python" - <<'END'
import wandb


settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
for what, id, resume in (
    ("first start", "one", "allow"),
    ("resumed with must", "one", "must"),
    ("another id with must", "another", "must"),
):
    with wandb.init(project="p", mode="offline", settings=settings, id=id, resume=resume) as run:
        print(f"{what}: step {run.step}, resumed {run.resumed}")
        assert (run.step, run.resumed) == (0, False)
        for step in range(6):
            run.log({"loss": 1.0}, step=step)
END
