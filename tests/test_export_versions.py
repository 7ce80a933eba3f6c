"""Versions of transformers that the exported code refuses, or treats alike."""

import importlib.util
import sys
import types

import pytest
from export_helpers import exported, random_ids, torch

from lm2_jax.convert.huggingface_model import configuration_lm2


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0"])
def test_an_older_one_is_refused_in_a_sentence(version, monkeypatch):
    older = types.ModuleType("transformers")
    older.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", older)
    spec = importlib.util.spec_from_file_location("configuration_lm2", configuration_lm2.__file__)
    with pytest.raises(ImportError, match=f"^LM2 needs transformers >= 5.4, found {version}$"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("version", ["5.4.0", "5.24.0.dev0", "6.0"])
def test_newer_ones_are_not(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    spec = importlib.util.spec_from_file_location("configuration_lm2", configuration_lm2.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.LM2Config.model_type == "lm2"


@torch.no_grad()
def test_both_names_of_the_cache():
    """Before 5.24 past_key_values, then cache."""
    model, ids = exported("lm2"), random_ids(2, 20)
    expected = model(ids).logits[:, 12:]
    for name in ("cache", "past_key_values"):
        first = model(ids[:, :12])
        torch.testing.assert_close(model(ids[:, 12:], **{name: first[1]}).logits, expected, atol=1e-5, rtol=0)
