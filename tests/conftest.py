"""Eight fake devices on the CPU for every test, what they compile is kept, and the --runslow flag."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from quick import xla_flags

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=8)}
# What one test compiles, or a process that it starts, later ones load; xdist's workers load each other's
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] if _IS_WORKER else tempfile.mkdtemp(prefix="compiled-")
os.environ |= {"JAX_COMPILATION_CACHE_DIR": _COMPILED, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import pytest


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_unconfigure():
    if not _IS_WORKER:
        shutil.rmtree(_COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--runslow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --runslow"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The directory of an uninterrupted run of `helpers.short_config`."""
    from helpers import quick_training, short_config

    from lm2_jax.training.loop import train

    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with quick_training():
        train(short_config(run_dir))
    return run_dir


@pytest.fixture
def run_dir(whole, tmp_path):
    """A copy of it: complete, with checkpoints 8 and 12."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def modules_of_transformers(tmp_path_factory):
    """Code that comes with a model is copied to a directory of this run, and quietly."""
    import transformers

    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = str(tmp_path_factory.mktemp("modules"))
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        transformers.utils.logging.disable_progress_bar()
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_programs_in_memory():
    """A compiled program takes some ten memory maps of a process, of which Linux allows 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(autouse=True)
def _warnings_of_this_test():
    """A warning that is given once a process is given again in each test."""
    from lm2_jax.common.errors import warn_once

    warn_once.cache_clear()


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A new bucket of an emulator, with an empty cache of this machine."""
    from store_helpers import new_bucket

    made = new_bucket()
    for key, value in made.emulator.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("LM2_JAX_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture
def impatient(monkeypatch):
    """Waits between tries are short; a function that sets for how many seconds requests are tried again."""
    from lm2_jax.checkpoint import store
    from lm2_jax.common import gcs

    monkeypatch.setattr(gcs, "_LONGEST_WAIT", 0.05)
    monkeypatch.setattr(gcs, "_FIRST_WAIT", 0.05)
    monkeypatch.setitem(store._RETRIES, "max_retries", 2)
    return lambda seconds: monkeypatch.setattr(gcs, "PATIENCE_SECONDS", seconds)
