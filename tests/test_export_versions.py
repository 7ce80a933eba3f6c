"""Versions of transformers that the exported code refuses, or treats alike."""

import importlib.util
import sys
import types

import pytest
from export_helpers import exported, random_ids, torch

from lm2_jax.convert.huggingface_model import configuration_lm2


def imported_anew(monkeypatch):
    spec = importlib.util.spec_from_file_location("anew", configuration_lm2.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "anew", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0"])
def test_an_older_one_is_refused_in_a_sentence(version, monkeypatch):
    older = types.ModuleType("transformers")
    older.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", older)
    with pytest.raises(ImportError, match=f"^LM2 needs transformers >= 5.4, found {version}$"):
        imported_anew(monkeypatch)


@pytest.mark.parametrize("version", ["5.4.0", "5.24.0.dev0", "6.0"])
def test_newer_ones_are_not(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    assert imported_anew(monkeypatch).LM2Config.model_type == "lm2"


@torch.no_grad()
def test_both_names_of_the_cache():
    """Before 5.24 past_key_values, then cache."""
    model, ids = exported("lm2"), random_ids(2, 20)
    expected = model(ids).logits[:, 12:]
    for name in ("cache", "past_key_values"):
        first = model(ids[:, :12])
        torch.testing.assert_close(model(ids[:, 12:], **{name: first[1]}).logits, expected, atol=1e-5, rtol=0)
