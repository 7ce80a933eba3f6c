"""What the README shows works: its commands parse, its configs load, its memory kind runs, its pictures are there."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.config import load_config, parse_config
from lm2_jax.model.decoder import Decoder
from lm2_jax.segments import run_segments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(*languages):
    """Its blocks of code in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands():
    """Every command of ours in its blocks, as words."""
    for block in blocks("bash", ""):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.findall(r"python (?:-m lm2_jax\.|tools/)[^&]*", line):
                for quote in "'\"":  # of a command inside another's argument
                    part = part.removesuffix(quote) if part.count(quote) % 2 else part
                yield shlex.split(part, comments=True)


class Parsed(Exception):
    """A command got this far."""


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words[1:])[:70]) for words in commands()])
def test_commands_parse(words, monkeypatch):
    module, arguments = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *_):
        raise Parsed(parse(parser))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(module).main()
    told = parsed.value.args[0]
    if getattr(told, "config", None) and Path(told.config).exists():
        load_config(told.config, told.set)


def test_commands_are_found():
    assert len(list(commands())) > 25


def test_memory_kind_of_the_readme():
    (code,) = (block for block in blocks("python") if "class Mean" in block)
    names = {}
    exec(code, names)
    config = parse_config(
        "{model: {vocab_size: 11, d_model: 8, num_layers: 2, num_heads: 2, num_kv_heads: 2, d_ff: 8}, "
        "memory: {kind: none}, data: {segment_length: 4}}"
    )
    model = Decoder(config, names["Mean"](config))
    tokens_BST = np.arange(24).reshape(2, 3, 4) % 11
    memory = model.init_memory(2)
    params = model.init(jax.random.key(0), tokens_BST[:, 0], memory)["params"]
    logits_BSTV, after = run_segments(model, params, tokens_BST, memory)
    changed, _ = run_segments(model, params, np.where(np.arange(3)[:, None] == 0, 5, tokens_BST), memory)
    assert not np.allclose(logits_BSTV[:, 1], changed[:, 1]), "nothing passes from segment to segment"
    reset_BS = np.ones((2, 3), bool)
    resets, _ = run_segments(model, params, tokens_BST, memory, reset_BS=reset_BS)
    alone, _ = run_segments(model, params, tokens_BST[:, 1:2], memory)
    np.testing.assert_allclose(resets[:, 1:2], alone, atol=1e-5)
    padded, kept = run_segments(model, params, tokens_BST[:, :1], after, document_BST=np.zeros((2, 1, 4), np.int32))
    np.testing.assert_array_equal(kept, after)
    assert jnp.isfinite(padded).all()


def test_what_it_links_to_is_there():
    linked = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r'src="(?!http)([^"]+)"', README)
    assert not [path for path in linked if not (ROOT / path).exists()]
