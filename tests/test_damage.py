"""Damaged checkpoints are found, moved aside and survived."""

import json
import shutil

import pytest
from helpers import assert_same_run, checkpoint_steps, newest_checkpoint, quick_training, short_config

import lm2_jax
from lm2_jax.common.errors import UserError
from lm2_jax.training.loop import train


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_training():
        yield


def data_files(checkpoint, item):
    """The files that hold arrays and the trees that find them."""
    return sorted(path for path in (checkpoint / item).rglob("d/*") if path.is_file())


def truncate(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(*paths):
    """A bit in the middle of each."""
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


def exchange(checkpoint, item):
    """Another checkpoint's item: in perfect order, so only checksums can tell."""
    shutil.rmtree(checkpoint / item)
    shutil.copytree(checkpoint.parent / "8" / item, checkpoint / item)


def change_progress(**changes):
    def change(checkpoint):
        path = checkpoint / "progress" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


DAMAGE = {
    "truncated parameters": lambda c: truncate(*data_files(c, "params")),
    "truncated training": lambda c: truncate(*data_files(c, "training")),
    "flipped bits in parameters": lambda c: flip(*data_files(c, "params")),
    "flipped bits in training": lambda c: flip(*data_files(c, "training")),
    "parameters of another step": lambda c: exchange(c, "params"),
    "training of another step": lambda c: exchange(c, "training"),
    "no array data": lambda c: [path.unlink() for path in data_files(c, "params")],
    "no manifest": lambda c: (c / "params" / "manifest.ocdbt").unlink(),
    "no parameters": lambda c: shutil.rmtree(c / "params"),
    "no progress": lambda c: shutil.rmtree(c / "progress"),
    "broken progress": lambda c: truncate(c / "progress" / "metadata"),
    "empty progress": lambda c: (c / "progress" / "metadata").write_text(""),
    "list for progress": lambda c: (c / "progress" / "metadata").write_text("[]"),
    "changed progress": change_progress(tokens=1),
    "fewer checksums": change_progress(checksums=[1]),
    "empty directory": lambda c: (shutil.rmtree(c), c.mkdir()),
}
HARMLESS = {  # Orbax does without, and the checksums vouch for what it reads
    "no tree metadata": lambda c: (c / "params" / "_METADATA").unlink(),
    "no checkpoint metadata": lambda c: (c / "_CHECKPOINT_METADATA").unlink(),
    "empty checkpoint metadata": lambda c: (c / "_CHECKPOINT_METADATA").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_passed_over(damage, run_dir, whole, capfd):
    DAMAGE[damage](newest_checkpoint(run_dir))
    (run_dir / "summary.json").unlink()
    train(short_config(run_dir))
    captured = capfd.readouterr()
    assert "warning: checkpoint 12 is damaged" in captured.err
    assert str(run_dir / "damaged_checkpoints" / "12") in captured.err
    assert "resuming after step 8" in captured.out
    assert (run_dir / "damaged_checkpoints" / "12").is_dir()
    assert checkpoint_steps(run_dir) == [8, 12]
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize("damage", HARMLESS)
def test_what_can_be_missed(damage, run_dir, whole, capfd):
    HARMLESS[damage](newest_checkpoint(run_dir))
    train(short_config(run_dir))
    assert "resuming after step 12" in capfd.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not (run_dir / "damaged_checkpoints").exists()


def test_damaged_twice_keeps_both(run_dir, whole):
    for _ in range(2):
        DAMAGE["no progress"](newest_checkpoint(run_dir))
        train(short_config(run_dir))
    assert sorted(path.name for path in (run_dir / "damaged_checkpoints").iterdir()) == ["12", "12.1"]
    assert_same_run(run_dir, whole)


def test_all_damaged(run_dir, whole):
    for step in checkpoint_steps(run_dir):
        DAMAGE["truncated parameters"](run_dir / "checkpoints" / str(step))
    records = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="all 2 checkpoints were damaged and moved aside"):
        train(short_config(run_dir))
    assert (run_dir / "metrics.jsonl").read_bytes() == records
    assert sorted(path.name for path in (run_dir / "damaged_checkpoints").iterdir()) == ["12", "8"]
    train(short_config(run_dir))  # as the message says: once more starts afresh
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize("damage", ["truncated parameters", "parameters of another step", "no manifest", "no progress"])
def test_load_damaged(damage, run_dir):
    DAMAGE[damage](newest_checkpoint(run_dir))
    for path in (run_dir, newest_checkpoint(run_dir)):
        with pytest.raises(UserError, match="take an older one") as caught:
            lm2_jax.load(path)
        assert str(newest_checkpoint(run_dir)) in str(caught.value)
    lm2_jax.load(run_dir / "checkpoints" / "8")
