"""Two processes that share no file: each has a folder and a cache of its own, and they have a bucket together."""

import pytest
from helpers import assert_same_run, tiny_config
from pairs import SIZES, killed_at_last, of_a_pair, start_one
from store_helpers import StoreRun
from test_distributed import assert_same_training

from lm2_jax.config import save_config


def start_pair(bucket, folder, run, steps=6):
    """Both processes, in new folders, each with its own copy of the config."""
    pair = []
    for environment in of_a_pair():
        machine = folder / f"{run}-{len(list(folder.iterdir()))}"
        file = folder / f"{machine.name}.yaml"
        save_config(tiny_config(f"{bucket.url}/{run}", *SIZES, f"train.steps={steps}"), file)
        pair.append(StoreRun(file, bucket, machine, "--distributed", run=run, environment=environment))
    return pair


def finish_pair(*arguments):
    with killed_at_last(start_pair(*arguments)) as pair:
        for run in pair:
            run.finish()


@pytest.mark.slow
def test_a_pair_without_a_common_file(bucket, tmp_path):
    folder = tmp_path / "machines"
    folder.mkdir()
    finish_pair(bucket, folder, "whole")
    start_one(tmp_path / "one", 6).finish()
    whole = bucket.export("whole", tmp_path / "whole")
    assert_same_training(whole, tmp_path / "one")

    with killed_at_last(start_pair(bucket, folder, "killed")) as (first, second):
        second.wait_until(lambda run: 3 in bucket.steps("killed"))
        second.kill()
        first.finish(code=1, seconds=120)
        assert "process 1 of 2 " in first.output() and "start all of them again" in first.output()
    assert not bucket.names("killed/.lease")  # given back, for machines that come instead
    finish_pair(bucket, folder, "killed")
    assert_same_run(bucket.export("killed", tmp_path / "killed"), whole)
