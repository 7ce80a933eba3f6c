"""An installed lm2_jax: what its wheel holds and asks for, and configs by name."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lm2_jax.common.errors import UserError
from lm2_jax.config import load_config

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
ASK = """
import json, lm2_jax
from lm2_jax.config import SHIPPED, load_config
shipped = {path.stem: load_config(path.stem) == load_config(path) for path in SHIPPED.glob("*.yaml")}
print(json.dumps([lm2_jax.__version__, str(SHIPPED), shipped]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built from a copy: setuptools leaves files behind."""
    pytest.importorskip("setuptools", reason="setuptools is not installed (requirements-dev.txt)")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in ("lm2_jax", "configs"):
        copytree(ROOT / folder, source / folder, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", BUILD, built], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    return path


def test_wheel_is_whole(wheel):
    """Every module, the configs, the mark of typed packages; nothing besides the package."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lm2_jax").rglob("*.py")}
    assert held == modules | {"lm2_jax/py.typed"} | {f"lm2_jax/config/shipped/{name}.yaml" for name in NAMES}


def test_wheel_finds_its_configs(wheel, tmp_path):
    """By name, outside any checkout, though somebody else's folder `configs` lies beside it."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "configs").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    told = subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    version, folder, shipped = json.loads(told.stdout or told.stderr)
    assert Path(folder) == site / "lm2_jax" / "config" / "shipped"
    assert f"-{version}-" in wheel.name and shipped == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # such as a run's directory
    assert load_config(name) == load_config(ROOT / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("path", ["lm2_126m", "configs/lm2_125m.yaml", "lm2_125m.yaml", "./lm2_125m", "x/lm2_125m"])
def test_only_a_bare_name_is_looked_up(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{Path(path)}: no such config file; ")
    assert str(error.value).endswith(", ".join(NAMES))


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lm2_125m").write_text("train: {seed: 77}")
    assert load_config("lm2_125m").train.seed == 77


# --- What it asks for ------------------------------------------------------------------------------------------------

STATING = ["pyproject.toml", "requirements.txt", "requirements-dev.txt", "README.md", "tools/lm2_colab.ipynb"]
STATING += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
VERSIONS = re.compile(r"""(?:^|['"])([\w-]+)(?:\[\w+\])?([<>=]=?\d[\d.,<>=]*)""", re.MULTILINE)


def test_a_package_has_one_range():
    """Wherever it is named, quoted or at the start of a line; a version that is pinned lies within."""
    ranges, pins = {}, []
    for path in STATING:
        for name, text in VERSIONS.findall((ROOT / path).read_text(encoding="utf-8")):
            package, versions = canonicalize_name(name), SpecifierSet(text)
            if text.startswith("=="):
                pins.append((package, text.removeprefix("==")))
            else:
                ranges.setdefault(package, {}).setdefault(versions, []).append(path)
    assert len(ranges) > 40 and len(pins) == 3
    assert not {package: found for package, found in ranges.items() if len(found) > 1}
    assert all(version in versions for package, version in pins for versions in ranges.get(package, ()))


def test_readme_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"`(\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert not set(project["optional-dependencies"]) - named
