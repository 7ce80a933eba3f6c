"""Eight fake devices on the CPU for every test, and the --runslow flag."""

import os
import shutil

os.environ["JAX_PLATFORMS"] = "cpu"
# Tiny programs: compiling takes the time, not running
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import pytest


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--runslow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --runslow"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The directory of an uninterrupted run of `helpers.short_config`."""
    from helpers import quick_training, short_config

    from lm2_jax.train import train

    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with quick_training():
        train(short_config(run_dir))
    return run_dir


@pytest.fixture
def run_dir(whole, tmp_path):
    """A copy of it: complete, with checkpoints 8 and 12."""
    return shutil.copytree(whole, tmp_path / "run")
