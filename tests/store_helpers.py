"""Shared by tests of object stores: a bucket of the emulator in this process, and runs in others that use it."""

import itertools
import json
import os
import subprocess
import sys

from gcs_emulator import Emulator
from helpers import REPOSITORY, Run
from quick import xla_flags

from lm2_jax.common.records import read_records
from lm2_jax.common.storage import to_path

_EMULATORS = []  # one: TensorStore keeps the first address that it hears of
_NUMBERS = itertools.count()


class Bucket:
    """A new bucket; `url` is gs://..., `emulator` the store that it is in."""

    def __init__(self, emulator):
        self.emulator, self.name = emulator, f"bucket-{os.getpid()}-{next(_NUMBERS)}"
        self.url = f"gs://{self.name}"
        emulator.make_bucket(self.name)

    def path(self, name=""):
        return to_path(f"{self.url}/{name}")

    def names(self, prefix=""):
        return self.emulator.names(self.name, prefix)

    def export(self, prefix, directory):
        return self.emulator.export(self.name, prefix, directory)

    def steps(self, run="run"):
        """Steps of a run's complete checkpoints."""
        names = self.names(f"{run}/checkpoints/")
        parts = [name.removeprefix(f"{run}/checkpoints/").split("/") for name in names]
        return sorted(int(step) for step, *rest in parts if rest == ["commit_success.txt"])

    def unfinished(self, run="run"):
        """Steps of a run's incomplete checkpoints."""
        names = self.names(f"{run}/checkpoints/")
        steps = {int(name.removeprefix(f"{run}/checkpoints/").split("/")[0]) for name in names}
        return sorted(steps - set(self.steps(run)))


def new_bucket():
    """A bucket of this process's emulator, which has no latency and no faults."""
    if not _EMULATORS:
        _EMULATORS.append(Emulator())
    emulator = _EMULATORS[0]
    emulator.latency, emulator.fault = 0.0, lambda method, name: None
    emulator.requests.clear()
    return Bucket(emulator)


class StoreRun(Run):
    """`helpers.Run` of a run directory `run` in a bucket, in a process with an empty folder and cache of its own."""

    def __init__(self, config_file, bucket, folder, *arguments, run="run", **options):
        self.bucket, self.run = bucket, run
        self._left = set(bucket.unfinished(run))  # by an earlier process, until this one removes them
        folder.mkdir()
        environment = {"LM2_JAX_CACHE": str(folder / "cache"), "HOME": str(folder), **bucket.emulator.environment}
        environment |= dict(options.pop("environment", {}))
        super().__init__(config_file, folder, *arguments, log=folder / "log", environment=environment, **options)

    def logged_step(self):
        records = [name for name in self.bucket.names(f"{self.run}/metrics.jsonl")]
        texts = [self.bucket.emulator.read(self.bucket.name, name) for name in records]
        return max((json.loads(text.splitlines()[-1])["step"] for text in texts if text), default=0)

    def saves_under_way(self):
        under_way = self.bucket.unfinished(self.run)
        self._left &= set(under_way)
        return [step for step in under_way if step not in self._left]

    def situation(self):
        return (
            f"logged to step {self.logged_step()}, checkpoints {self.bucket.steps(self.run)}, "
            f"incomplete {self.bucket.unfinished(self.run)}"
        )


def records_of(bucket, run="run"):
    return read_records(bucket.path(f"{run}/metrics.jsonl"))


def command(module, *arguments, bucket, folder, code=0):
    """Runs a command in a process of its own, in an empty folder; its output."""
    folder.mkdir()
    log = folder / "log"
    environment = {"LM2_JAX_CACHE": str(folder / "cache"), "HOME": str(folder), **bucket.emulator.environment}
    run = _Command(module, arguments, log, environment)
    run.finish(code=code)
    return run.output()


class _Command(Run):
    def __init__(self, module, arguments, log, environment):
        self.log = log
        environment = {**os.environ, **environment, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": xla_flags(devices=1)}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                cwd=log.parent,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
