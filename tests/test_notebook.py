"""The notebook runs from top to bottom, at tiny sizes, without network."""

import ast
import os
from importlib import metadata
from pathlib import Path

import nbclient
import nbformat
import pytest
from quick import xla_flags

NOTEBOOK = Path(__file__).parents[1] / "tools" / "lm2_colab.ipynb"


def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LM2_QUICK", "1")
    monkeypatch.setenv("LM2_FOLDER", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=1))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    if keep := os.environ.get("LM2_KEEP_NOTEBOOK"):  # to look at its pictures
        nbformat.write(notebook, keep)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert "1,200 tokens: " in printed and "JAX says the same" in printed
    warnings = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert not [text for text in warnings if "Warning" in text], warnings


def test_notebook_is_tracked_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


# --- Installing ----------------------------------------------------------------------------------------------------

PACKAGES = {
    "jax": ("0.12.0", ["numpy>=2.2", *(f'jax-{c}-plugin==0.12.0; extra == "{c}"' for c in ("cuda12", "cuda13"))]),
    "flax": ("0.12.2", []),
}
LINES = ["flax>=0.12.2,<0.13", "jax>=0.10,<0.13"]


@pytest.fixture
def missing(monkeypatch):
    """The notebook's function, with `PACKAGES` and others installed: name=(version, what it requires)."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (source,) = (cell.source for cell in cells if "def missing(" in cell.source)
    wanted = (ast.FunctionDef, ast.Import, ast.ImportFrom)
    names = {}
    exec(ast.unparse([node for node in ast.parse(source).body if isinstance(node, wanted)]), names)

    def run(machine, **others):
        installed = {**PACKAGES, **{name.replace("_", "-"): package for name, package in others.items()}}

        def found(name):
            if name not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(metadata, "version", lambda name: found(name)[0])
        monkeypatch.setattr(metadata, "requires", lambda name: found(name)[1])
        return names["missing"](machine, LINES)

    return run


def test_what_is_there_is_not_installed_again(missing):
    assert missing("cpu") == []
    assert missing("gpu", jax_cuda12_plugin=("0.12.0", [])) == []
    assert missing("gpu", jax_cuda13_plugin=("0.12.0", [])) == []


def test_versions_count_and_not_presence(missing):
    assert missing("cpu", flax=("0.12.0", [])) == LINES
    assert missing("cpu", jax=("0.9.2", [])) == LINES


def test_the_cuda_plugin_that_is_there_is_taken(missing):
    other = {"jax_cuda12_plugin": ("0.10.2", [])}
    assert missing("gpu", **other) == ["flax>=0.12.2,<0.13", "jax[cuda12]>=0.10,<0.13"]
    assert missing("gpu") == ["flax>=0.12.2,<0.13", "jax[cuda13]>=0.10,<0.13"]
