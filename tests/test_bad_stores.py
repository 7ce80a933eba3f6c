"""Runs in stores that fail: what a user can mend ends with exit code 2, a network that stays away with 1."""

import sys
import threading
import time

import pytest
from helpers import assert_same_run, quick_training, short_config
from store_helpers import StoreRun

from lm2_jax import convert_checkpoint, prepare_data
from lm2_jax import train as train_command
from lm2_jax.checkpoint.manager import Checkpoints
from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.files import lock_directory
from lm2_jax.config import save_config
from lm2_jax.training.loop import train


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Runs a command that ends with an exit code; what it printed to standard error. It may write no file."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments, code=2):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended, quick_training():
            run_command(module.main)
        assert ended.value.code == code
        assert not [path.name for path in tmp_path.iterdir() if ":" in path.name or path.name == "~"]
        return capsys.readouterr().err

    return run


def training(run_dir, tmp_path):
    save_config(short_config(run_dir), tmp_path / "config.yaml")
    return train_command, "--config", tmp_path / "config.yaml"


def test_no_such_bucket(bucket, tmp_path, fails):
    message = "error: train.run_dir: gs://nowhere-at-all/run cannot be written to (no such object, or no such bucket)\n"
    assert fails(*training("gs://nowhere-at-all/run", tmp_path)).endswith(message)


def test_no_permission(bucket, tmp_path, fails):
    bucket.emulator.fault = lambda method, name: 403
    assert f"{bucket.url}/run" in (error := fails(*training(f"{bucket.url}/run", tmp_path)))
    assert error.endswith("no permission\n")
    bucket.emulator.fault = lambda method, name: None if method == "GET" else 403  # may be read, and not written
    error = fails(*training(f"{bucket.url}/run", tmp_path))
    assert error.endswith(f"train.run_dir: {bucket.url}/run cannot be written to (no permission)\n")


def test_an_account_that_sees_objects_alone(bucket, tmp_path, whole):
    """It may not read the settings of the bucket itself, for which Orbax asks when it removes a checkpoint."""
    bucket.emulator.fault = lambda method, name: 403 if (name, method) == (f"{bucket.name}/", "GET") else None
    with quick_training():
        train(short_config(f"{bucket.url}/run"))
    assert_same_run(bucket.export("run", tmp_path / "exported"), whole)


def test_a_scheme_is_no_folder(tmp_path, fails):
    (tmp_path / "text.txt").write_text("some text")
    refused = "is not known; give gs://, s3:// or a path of this machine"
    assert refused in fails(*training("hdfs://host/run", tmp_path))
    prepare = "--input", "text.txt", "--tokenizer", "bytes", "--output"
    assert refused in fails(prepare_data, *prepare, "hdfs://host/prepared")
    assert "needs s3fs" in fails(prepare_data, *prepare, "s3://bucket/prepared")
    convert = "--from", "lm2_jax", "--to", "huggingface", "--input", "run", "--output"
    assert refused in fails(convert_checkpoint, *convert, "hdfs:/host/model")


def test_two_runs_at_once(bucket, tmp_path):
    config = short_config(f"{bucket.url}/run")
    with lock_directory(bucket.path("run"), "taken"), quick_training():
        message = r"/run: another process trains in it; .* \(process \d+ on .* holds its lease, renewed \d seconds ago"
        with pytest.raises(UserError, match=message):
            train(config)


def test_a_network_that_goes_away_in_a_save_and_comes_back(bucket, tmp_path, whole):
    """For ten seconds, in which nothing can be connected to."""
    save_config(short_config(f"{bucket.url}/run"), tmp_path / "config.yaml")
    run = StoreRun(tmp_path / "config.yaml", bucket, tmp_path / "machine")
    run.wait_until(lambda run: run.saves_under_way())
    bucket.emulator.go_away()
    try:
        time.sleep(10)
        assert run.process.poll() is None, run.output()
    finally:
        bucket.emulator.come_back()
    run.finish()
    assert_same_run(bucket.export("run", tmp_path / "exported"), whole)


@pytest.mark.parametrize("gone", ["in a save", "after a save"])
def test_a_network_that_stays_away(gone, bucket, tmp_path, whole, impatient, monkeypatch):
    """The run ends, names its newest checkpoint, and is resumed later."""
    impatient(0.5)
    config, save = short_config(f"{bucket.url}/run"), Checkpoints.save

    def save_one(self, state, *rest):
        if int(state.step) == 8 and gone == "in a save":
            self.wait()
            bucket.emulator.fault = lambda method, name: 503
        save(self, state, *rest)
        if int(state.step) == 4 and gone == "after a save":
            self.wait()
            bucket.emulator.fault = lambda method, name: 503

    with quick_training():
        with monkeypatch.context() as patched, pytest.raises(TrainingFailed) as failure:
            patched.setattr(Checkpoints, "save", save_one)
            train(config)
        assert "the store can be reached again, the same command resumes" in str(failure.value) or (
            "metrics.jsonl: cannot be written (the store cannot be reached" in str(failure.value)
        )
        if gone == "in a save":
            assert "a checkpoint could not be saved" in str(failure.value)
            assert "the newest intact one is 4." in str(failure.value)
        bucket.emulator.fault = lambda method, name: None
        assert bucket.steps() == [4]
        train(config)
    assert_same_run(bucket.export("run", tmp_path / "exported"), whole)


def test_the_last_requests_of_a_run_do_not_wait(bucket, impatient):
    """Once a request was given up, the others are tried once, until one succeeds."""
    impatient(1.0)
    bucket.emulator.fault = lambda method, name: 503
    began, path = time.monotonic(), bucket.path("a")
    for _ in range(5):
        with pytest.raises(OSError, match="cannot be reached"):
            path.write_text("x")
    assert time.monotonic() - began < 4
    bucket.emulator.fault = lambda method, name: None
    path.write_text("x")
    timer = threading.Timer(0.4, lambda: setattr(bucket.emulator, "fault", lambda method, name: None))
    bucket.emulator.fault = lambda method, name: 503
    timer.start()
    path.write_text("y")
    assert path.read_text() == "y"
