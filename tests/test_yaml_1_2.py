"""Numbers and booleans of config files are those of YAML 1.2; PyYAML's own are 1.1's."""

import math

import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import Config, dump_config, parse_config

QUICK = "optim: {warmup_steps: 0}"


def _read(key, value):
    """What the file and `--set` make of a value; they must agree."""
    section, name = key.split(".")
    config = parse_config(f"{QUICK}\n{section}: {{{name}: {value}}}")
    assert parse_config(QUICK, [f"{key}={value}"]) == config
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0100", 100), ("016", 16), ("08", 8), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("007.0", 7)],
)
def test_integers(text, number):
    assert _read("train.steps", text) == number


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10.0), ("01.5", 1.5), ("1.", 1.0), (".5", 0.5), ("+.5e3", 500.0), ("1e05", 1e5)]
)
def test_floats(text, number):
    assert _read("model.rope_theta", text) == number


@pytest.mark.parametrize("text", ["1:30", "0b11", "0O17", "-0x1F", "0x", "0o8", "1e", "190:20:30", "١٢٣"])
@pytest.mark.parametrize("key", ["train.steps", "model.rope_theta"])
def test_what_is_no_number(key, text):
    with pytest.raises(UserError, match=f"{key}: found '{text}'; should be a valid"):
        _read(key, text)


@pytest.mark.parametrize("text", ["0o17", "0x1F", "0b11", "089", "1:30", "1:30.5", "1_000", "off", "Yes", "="])
def test_quoted_text_stays_text(text):
    """Also when it is written, for readers of either version."""
    config = parse_config("", [f"train.run_dir='{text}'"])
    assert config.train.run_dir == text
    assert parse_config(dump_config(config)) == config
    assert f"run_dir: '{text}'" in dump_config(config)


@pytest.mark.parametrize("text", ["1:30", "1_000", "off", "yes", "0b11", "="])
def test_text_without_quotes(text):
    assert _read("train.run_dir", text) == text


@pytest.mark.parametrize("text", ["0100", "0o17", "0x1F", "true", ".5"])
def test_text_that_needs_quotes(text):
    with pytest.raises(UserError, match=r"train\.run_dir: found "):
        _read("train.run_dir", text)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("TRUE", True)])
def test_booleans(text, value):
    assert _read("model.tie_embeddings", text) is value


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", ".NaN"])
def test_what_is_not_finite(text):
    with pytest.raises(UserError, match=r"model\.rope_theta: found -?(inf|nan)"):
        _read("model.rope_theta", text)


@pytest.mark.parametrize("text", ["null", "~", "Null", ""])
def test_null(text):
    assert _read("model.vocab_size", text) is None


def test_every_float_comes_back():
    for theta in (1e16, 1e-7, 123456789.125, math.pi, 5e5):
        config = parse_config("", [f"model.rope_theta={theta!r}"])
        assert config.model.rope_theta == theta
        assert parse_config(dump_config(config)) == config
    assert parse_config(dump_config(Config())) == Config()
