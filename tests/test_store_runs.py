"""Runs that live in a bucket: killed at any moment and started again in an empty folder, they equal one on a disk."""

import random
import shutil
import time

import pytest
from helpers import REPOSITORY, Run, assert_same_run, text_overrides, tiny_config
from store_helpers import StoreRun, command

import lm2_jax
from lm2_jax.checkpoint.checksums import array_checksums
from lm2_jax.common.errors import UserError
from lm2_jax.common.records import read_records
from lm2_jax.config import load_config, save_config
from lm2_jax.loading import load_run, read_progress


def logged(step):
    return lambda run: run.logged_step() >= step


def saving(step=0):
    return lambda run: any(under_way >= step for under_way in run.saves_under_way())


def saved(step):
    return lambda run: step in run.bucket.steps(run.run)


def said(text):
    return lambda run: text in run.output()


def after(seconds):
    return lambda run: time.time() - run.started >= seconds


def killed_and_finished(config_file, bucket, tmp_path, moments):
    """Starts a run as often as there are moments to kill it, each time in an empty folder; then lets it end."""
    kills = []
    for number, (name, moment, seconds) in enumerate(moments):
        run = StoreRun(config_file, bucket, tmp_path / f"machine-{number}", announce_restore=True)
        try:
            run.wait_until(moment, seconds=900)
            time.sleep(seconds)
        finally:
            alive = run.process.poll() is None
            run.kill()
        kills.append(f"{number + 1:2}. {name}: {run.situation()}")
        print(kills[-1], flush=True)
        assert alive, f"the run ended before it was killed {name}:\n{run.output()}"
    StoreRun(config_file, bucket, tmp_path / "last-machine").finish()
    return "\n".join(kills)


def test_killed_run_equals_whole_run(bucket, tmp_path):
    whole = tiny_config(tmp_path / "whole")
    save_config(whole, tmp_path / "whole.yaml")
    Run(tmp_path / "whole.yaml", tmp_path / "whole").finish()
    save_config(tiny_config(f"{bucket.url}/run"), tmp_path / "killed.yaml")
    moments = ("during a save", saving(), 0), ("after step 12", logged(12), 0)
    kills = killed_and_finished(tmp_path / "killed.yaml", bucket, tmp_path, moments)
    assert_same_run(bucket.export("run", tmp_path / "killed"), tmp_path / "whole", note=kills)
    assert not [path for folder in (REPOSITORY, *tmp_path.glob("*machine*")) for path in folder.glob("gs*")]
    assert not bucket.names("run/.lease") and not bucket.names("run/metrics.jsonl.parts")


def made_in(place, folder, bucket, overrides):
    """Tokenizer, prepared data, run and export in a directory or a bucket; a function to run more commands there."""

    def run(module, *arguments):
        machine = folder / f"machine-{len(list(folder.iterdir()))}"
        return command(f"lm2_jax.{module}", *arguments, bucket=bucket, folder=machine)

    folder.mkdir()
    tokenizer, prepared = f"{place}/tokenizer.json", f"{place}/prepared"
    run("train_tokenizer", "--input", f"{place}/*.txt", "--output", tokenizer, "--vocab-size", 270)
    prepare = "--input", f"{place}/text.txt", "--tokenizer", tokenizer, "--workers", 1, "--shard-mb", 0.001
    run("prepare_data", *prepare, "--document-separator", r"\n\n", "--output", prepared)
    config = tiny_config(
        f"{place}/run", *overrides, "data.source=prepared", "data.document_separator=null", f"data.path={prepared}",
        "tokenizer.kind=tokenizers", f"tokenizer.path={prepared}/tokenizer.json", "train.steps=10",
    )  # fmt: skip
    save_config(config, f"{place}/config.yaml")
    run("train", "--config", f"{place}/config.yaml")
    convert = "--from", "lm2_jax", "--input", f"{place}/run"
    run("convert_checkpoint", *convert, "--to", "huggingface", "--output", f"{place}/exported")
    return run


def test_everything_in_a_bucket(bucket, tmp_path):
    """Tokenizer, data, run, export, evaluation and memory; on a disk the same commands give the same."""
    overrides, disk = text_overrides(tmp_path / "text.txt", "packed"), tmp_path / "disk"
    disk.mkdir()
    shutil.copy(tmp_path / "text.txt", disk)
    bucket.path("text.txt").upload(tmp_path / "text.txt")
    made_in(disk, tmp_path / "disk-machines", bucket, overrides)
    run = made_in(bucket.url, tmp_path / "store-machines", bucket, overrides)

    checkpoint = f"{bucket.url}/run"
    evaluate = "--task", "perplexity", "--output", f"{bucket.url}/evaluation.json"
    run("evaluate", "--checkpoint", checkpoint, *evaluate)
    convert = "--from", "lm2_jax", "--input", checkpoint, "--to", "lm2_jax"
    run("convert_checkpoint", *convert, "--output", f"{bucket.url}/converted")
    generate = "--prompt", "the memory", "--max-new-tokens", 5
    memory = f"{bucket.url}/memory.safetensors"
    run("generate", "--checkpoint", checkpoint, *generate, "--save-memory", memory)
    run("generate", "--checkpoint", f"{bucket.url}/converted", *generate, "--load-memory", memory)
    assert "is damaged" not in run("prepare_data", "--inspect", f"{bucket.url}/prepared")
    assert "metrics.jsonl: sound (steps 1 to 10)" in run("train", "--verify", checkpoint)

    stored = bucket.export("", tmp_path / "stored")
    for name in ("tokenizer.json", "prepared/00000-00000.arrayrecord", "exported/model.safetensors"):
        assert (stored / name).read_bytes() == (disk / name).read_bytes(), name
    losses = [[record["loss"] for record in read_records(at / "run" / "metrics.jsonl")] for at in (stored, disk)]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    assert (stored / "evaluation.png").stat().st_size and not bucket.names("prepared/.progress")
    assert load_run(f"{bucket.url}/converted").config.model == load_run(disk / "run").config.model
    with pytest.raises(UserError, match="no such directory"):
        lm2_jax.load(f"{bucket.url}/nothing")


def test_an_evaluator_sees_what_a_run_has_saved_since(bucket, tmp_path):
    """In one process, as an evaluator that waits for the next checkpoint."""
    save_config(tiny_config(f"{bucket.url}/run", "train.steps=5"), tmp_path / "config.yaml")
    checksums = []
    for steps in (5, 10):
        StoreRun(tmp_path / "config.yaml", bucket, tmp_path / str(steps), "--set", f"train.steps={steps}").finish()
        _, params = lm2_jax.load(f"{bucket.url}/run")
        checksums.append(array_checksums(params))
        assert read_progress(f"{bucket.url}/run")["step"] == steps
    assert checksums[0] != checksums[1]


STEPS, EVERY = 60, 10  # of the run that is killed ten times, and between its checkpoints


def ten_moments(rng):
    """(name, when, seconds to wait on top), in the order of a run's progress."""
    return (
        ("at start-up", after(rng.uniform(0.5, 6)), 0),
        ("while compiling", said("run directory"), rng.uniform(0, 5)),
        ("after a step, nothing saved yet", logged(EVERY // 2), rng.uniform(0, 0.5)),
        ("during the first save", saving(), rng.uniform(0, 0.05)),
        ("right after a save", saved(EVERY), 0),
        ("while restoring", said("restoring"), rng.uniform(0, 0.2)),
        ("during a save", saving(3 * EVERY), rng.uniform(0, 0.1)),
        ("after a step", logged(4 * EVERY + EVERY // 2), rng.uniform(0, 0.5)),
        ("during the last save", saving(STEPS), 0),
        ("at the end", said("asking"), rng.uniform(0, 1)),
    )


@pytest.mark.slow
def test_ten_kills_of_the_embedded_default(bucket, tmp_path):
    """configs/babilong_tiny.yaml, but for its number of steps and of questions."""
    shorter = (
        f"train.steps={STEPS}", f"checkpoint.every_steps={EVERY}", f"train.log_every={EVERY // 2}",
        "eval.every_steps=20", "eval.questions=32", "eval.lengths=[1, 4]",
    )  # fmt: skip
    save_config(
        load_config("babilong_tiny", [f"train.run_dir={tmp_path / 'whole'}", *shorter]), tmp_path / "whole.yaml"
    )
    Run(tmp_path / "whole.yaml", tmp_path / "whole").finish(seconds=3600)
    save_config(load_config("babilong_tiny", [f"train.run_dir={bucket.url}/run", *shorter]), tmp_path / "killed.yaml")
    kills = killed_and_finished(tmp_path / "killed.yaml", bucket, tmp_path, ten_moments(random.Random(0)))
    assert_same_run(bucket.export("run", tmp_path / "killed"), tmp_path / "whole", note=kills)
    print(f"{len(kills.splitlines())} kills, {STEPS} steps, equal", flush=True)
