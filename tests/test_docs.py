"""What the pages show works: commands parse, configs load, the memory kind runs, links lead somewhere."""

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import configuration_page
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.config import load_config, parse_config
from lm2_jax.model.decoder import Decoder
from lm2_jax.segments import run_segments

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def blocks(page, *languages):
    """A page's blocks of code in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)\n```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands():
    """Every command of ours in the pages' blocks: the page, and the command as words, its module first."""
    ours = rf"(?:python -m lm2_jax\.|\b(?:{'|'.join(SCRIPTS)}) )[^&]*"
    for page in PAGES:
        for block in blocks(page, "bash", ""):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.findall(ours, line):
                    for quote in "'\"":  # of a command inside another's argument
                        part = part.removesuffix(quote) if part.count(quote) % 2 else part
                    script, *words = shlex.split(part.removeprefix("python -m "), comments=True)
                    module = SCRIPTS.get(script, script).removesuffix(":command")
                    yield pytest.param(module, words, id=f"{page}: {part[:70].removeprefix('python ').strip()}")


class Parsed(Exception):
    """A command got this far."""


@pytest.mark.parametrize(("module", "arguments"), list(commands()))
def test_commands_parse(module, arguments, monkeypatch):
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


def test_pieces_of_python_compile():
    pieces = [(page, code) for page in PAGES for code in blocks(page, "python")]
    assert len(pieces) >= 4
    for page, code in pieces:
        compile(code, page, "exec")


def test_memory_kind_of_the_docs():
    (code,) = (block for page in PAGES for block in blocks(page, "python") if "class Mean" in block)
    names = {}
    exec(code, names)
    config = parse_config(
        "{model: {vocab_size: 11, d_model: 8, num_layers: 2, num_heads: 2, num_kv_heads: 2, d_ff: 8}, "
        "memory: {kind: none}, data: {segment_length: 4}}"
    )
    model = Decoder(config.spec, names["Mean"](config.spec))
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


def anchors(text):
    """What GitHub makes of a page's headings, for links to them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]) + re.findall(r'src="(?!http)([^"]+)"', PAGES[page])
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page} links to {link}"


def test_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 12 * 1024
    assert PAGES["README.md"].count("\n") <= 220


def test_configuration_page_is_what_the_settings_say():
    assert configuration_page.PAGE.read_text(encoding="utf-8") == configuration_page.page()
