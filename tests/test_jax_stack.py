"""Packages of JAX that do not belong together are named at the start; nothing of them is imported for it."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lm2_jax.common import jax_stack
from lm2_jax.common.errors import UserError

ROOT = Path(__file__).parents[1]
JAX = {
    "0.10.2": ["jaxlib<=0.10.2,>=0.10.1", 'libtpu==0.0.42.*; extra == "tpu"', 'jaxlib==0.9.2; extra == "ci"'],
    "0.12.0.1": ["jaxlib<=0.12.0.1,>=0.11.2", 'libtpu==0.0.50.*; extra == "tpu"', "numpy>=2.2"],
}


@pytest.fixture
def check(monkeypatch, capsys):
    """Checks a set of installed packages; returns what was warned of."""

    def run(platforms=None, **versions):
        installed = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(package):
            if package not in installed:
                raise metadata.PackageNotFoundError(package)
            return installed[package]

        monkeypatch.setattr(jax_stack.metadata, "version", version)
        monkeypatch.setattr(jax_stack.metadata, "requires", lambda package: JAX[installed[package]])
        jax_stack.check_jax_stack(platforms)
        return capsys.readouterr().err

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return run


def test_what_belongs_together_is_silent(check):
    assert check(jax="0.10.2", jaxlib="0.10.2") == ""
    assert check(jax="0.10.2", jaxlib="0.10.1", jax_cuda12_plugin="0.10.1", libtpu="0.0.42.1") == ""
    assert check(jax="0.12.0.1", jaxlib="0.12.0.1", jax_cuda13_plugin="0.12.0.1", libtpu="0.0.50.1") == ""


@pytest.mark.parametrize("jaxlib", ["0.9.2", "0.12.0"])
def test_jaxlib_of_another_jax(check, jaxlib):
    """JAX itself would end in a traceback."""
    with pytest.raises(UserError, match=re.escape(f"jax 0.10.2 needs jaxlib<=0.10.2,>=0.10.1, found {jaxlib}; pip")):
        check("cpu", jax="0.10.2", jaxlib=jaxlib)


def test_plugin_of_another_jax(check, monkeypatch):
    """JAX would warn, and compute on the CPU."""
    swapped = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax_cuda12_plugin": "0.12.0"}
    said = "jax-cuda12-plugin 0.12.0 does not fit jaxlib 0.10.2"
    with pytest.raises(UserError, match=said) as error:
        check(**swapped)
    assert "pip install 'jax[cuda12]==0.10.2'" in str(error.value) and "JAX_PLATFORMS=cpu" in str(error.value)
    with pytest.raises(UserError, match=said):
        check("cuda,cpu", **swapped)
    assert check("tpu", **swapped) == ""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert check(**swapped) == ""


def test_libtpu_of_another_jax(check):
    mixed = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "libtpu": "0.0.42.1"}
    assert check("cpu", **mixed) == ""
    assert check(**mixed) == "warning: libtpu 0.0.42.1 is another JAX's; the one of jax 0.12.0.1 is libtpu==0.0.50.*\n"


def test_installed_jax_says_which_libtpu_it_needs():
    """Its metadata has an extra for TPUs; aot asks for what it names."""
    (said,) = [text for text in metadata.requires("jax") if text.startswith("libtpu")]
    assert str(jax_stack.libtpu_of_jax()) == re.search(r"==[\d.*]+", said).group()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--config", "babilong_tiny"],
        ["evaluate", "--checkpoint", "x", "--task", "babilong"],
        ["generate", "--checkpoint", "x", "--prompt", "x"],
        ["bench", "--config", "babilong_tiny"],
        ["convert_checkpoint", "--from", "lm2_jax", "--to", "official", "--input", "x", "--output", "y"],
        ["inspect_memory", "--checkpoint", "x", "--output", "y"],
        ["inspect_answers", "--run", "x"],
    ],
    ids=lambda command: command[0],
)
def test_commands_name_it_before_they_start(command, tmp_path):
    """With a plugin in the path that is nothing but its metadata."""
    plugin = tmp_path / "jax_cuda12_plugin-0.1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda12-plugin\nVersion: 0.1.0\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path)))}
    environment.pop("JAX_PLATFORMS", None)
    line = [sys.executable, "-m", f"lm2_jax.{command[0]}", *command[1:]]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: jax-cuda12-plugin 0.1.0 does not fit jaxlib")
    assert done.stderr.count("\n") == 1
