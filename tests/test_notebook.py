"""The notebook runs from top to bottom, at tiny sizes, without network."""

import os
from pathlib import Path

import nbclient
import nbformat
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
