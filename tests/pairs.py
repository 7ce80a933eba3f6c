"""Runs of one process with eight devices, and of a pair with four each."""

import contextlib
import socket
from pathlib import Path

from helpers import Run, tiny_config
from quick import xla_flags

from lm2_jax.config import save_config

SIZES = ("mesh.data=2", "mesh.fsdp=4", "data.batch_size=8", "eval.every_steps=4", "checkpoint.every_steps=3")


def config_file(run_dir, steps, *overrides):
    path = Path(f"{run_dir}.yaml")
    save_config(tiny_config(run_dir, *SIZES, f"train.steps={steps}", *overrides), path)
    return path


def start_one(run_dir, steps, *overrides):
    return Run(config_file(run_dir, steps, *overrides), run_dir, environment={"XLA_FLAGS": xla_flags(devices=8)})


def of_a_pair():
    """The environments of its two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {"XLA_FLAGS": xla_flags(devices=4), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [shared | {"JAX_PROCESS_ID": str(process)} for process in range(2)]


def start_pair(run_dir, steps, *overrides):
    file = config_file(run_dir, steps, *overrides)
    return [
        Run(
            file,
            run_dir,
            "--distributed",
            log=f"{run_dir}.{process}.log",
            environment=environment,
        )
        for process, environment in enumerate(of_a_pair())
    ]


@contextlib.contextmanager
def killed_at_last(runs):
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()
