"""Hostile files: paths that lead out, sizes that are promised, values that explode."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers import random_checkpoint

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import read_json, read_limited, resolve_inside, short_repr
from lm2_jax.config import TokenizerConfig, load_config, parse_config
from lm2_jax.convert import directory, engine
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.data.babi.files import read_babi
from lm2_jax.data.documents import JsonLinesSource
from lm2_jax.tokenizer import BytesTokenizer, load_tokenizer


def refused(read, *arguments):
    with pytest.raises(UserError) as error:
        read(*arguments)
    return str(error.value)


# --- Paths ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """A directory with a file in it, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("file")
    return tmp_path / "home"


@pytest.mark.parametrize("name", ["../secret", "..", ".", "", "/etc/passwd", "a/../file", "file\0", "\ud800", "file\n"])
def test_more_than_a_name_is_refused(home, name):
    assert "is not the name of a file here" in refused(resolve_inside, home, name)


def test_links_stay_in_their_directory(home):
    (home / "inside").symlink_to("file")
    (home / "outside").symlink_to("../secret")
    (home / "nowhere").symlink_to("nothing")
    os.mkfifo(home / "fifo")
    assert resolve_inside(home, "inside").read_text() == "file"
    assert "outside: links to a file outside its directory" in refused(resolve_inside, home, "outside")
    for name in ("nowhere", "fifo", "missing"):
        assert f"{name}: is missing, or not a plain file" in refused(resolve_inside, home, name)
    assert "cannot be read (File name too long)" in refused(resolve_inside, home, "x" * 300)


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1f"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "5e").write_text("{}")
    (tmp_path / "models--a--b" / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/5e")
    (snapshot / "other.json").symlink_to("../../secret")
    assert read_json(snapshot / "config.json") == {}
    (snapshot / "checkpoint-10").mkdir()
    (snapshot / "checkpoint-10" / "config.json").symlink_to("../../../blobs/5e")
    assert read_json(snapshot / "checkpoint-10" / "config.json") == {}
    assert "outside its directory" in refused(read_json, snapshot / "other.json")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a\0", "\ud800", "x" * 300])
def test_shards_stay_beside_their_index(tmp_path, name):
    write_tensors(tmp_path, "model", [("x", np.ones(3, np.float32))])
    (tmp_path / "shards").mkdir()
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    assert "does not describe its files" in refused(open_tensors, index.parent, "model")


@pytest.mark.parametrize("name", ["config.yaml", "params.safetensors", "origin/config.json", "origin"])
def test_a_converted_directory_leads_nowhere_else(tmp_path, name):
    """What it links to is neither read nor copied into what is made of it."""
    path = random_checkpoint(tmp_path / "ours")
    (path / "origin").mkdir()
    (path / "origin" / "config.json").write_text("{}")
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")

    def copy():
        with directory.new_directory(tmp_path / "copy") as partial:
            directory.write(directory.read(path), partial, lambda items, _: items)

    assert f"{Path(name).name}: links to " in refused(copy)
    assert not (tmp_path / "copy").exists()


# --- Sizes ---------------------------------------------------------------------------------------------------------


def test_files_are_read_up_to_a_bound(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_limited(tmp_path / "file", 5) == b"12345"
    assert "is longer than 4 bytes" in refused(read_limited, tmp_path / "file", 4)
    assert "is longer than" in refused(read_limited, Path("/dev/zero"), 1000)


@pytest.mark.parametrize("name", ["config.yaml", "x.json", "tokenizer.json", "x.jsonl", "x.safetensors"])
def test_endless_files_are_refused_early(tmp_path, name):
    """Sparse files of 4 GiB."""
    path = tmp_path / name
    with path.open("wb") as file:
        file.write((2**31).to_bytes(8, "little"))
        file.truncate(1 << 32)
    read = {
        "config.yaml": load_config,
        "x.json": read_json,
        "tokenizer.json": lambda path: load_tokenizer(TokenizerConfig(kind="tokenizers", path=str(path))),
        "x.jsonl": lambda path: JsonLinesSource([path], BytesTokenizer()),
        "x.safetensors": lambda path: open_tensors(path, "x"),
    }[name]
    assert any(said in refused(read, path) for said in ("is longer than", "a header of 2,147,483,648 bytes"))


def test_a_config_of_any_size_allocates_nothing():
    config = parse_config("{model: {vocab_size: 2000000000}, data: {segment_length: 2000000000}}")
    assert engine.abstract_params(config)["embedding"].shape == (2_000_000_000, 96)


def test_a_torch_tensor_that_repeats_one_number(tmp_path):
    torch.save({"x": torch.ones(1).expand(1 << 40)}, tmp_path / "x.pth")
    assert "without numbers of their own: x" in refused(open_tensors, tmp_path / "x.pth", "x")


def test_a_compressed_torch_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("x/data.pkl", bytes(1 << 20))
    assert "it is compressed" in refused(open_tensors, tmp_path / "x.pth", "x")


# --- Configs -------------------------------------------------------------------------------------------------------


def bomb(first, of):
    """Nine aliases of nine aliases of ..., nine times."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {of.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 10)]
    return "\n".join([*lines, "model: *a9"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb("[x]", "[{}]"), "line 1 is not valid YAML: its aliases (*name) expand to far more than is written"),
        (bomb("{x: 1}", "{{<<: [{}]}}"), "its aliases (*name) expand to far more than is written"),
        ("model: &a [*a]", "its aliases (*name) expand to far more than is written"),
        ('data: {path: "a\\0b"}', "line 1 is not valid YAML: text with a NUL"),
        ('train: {run_dir: "\\ud800"}', "text with a NUL, or with half a surrogate pair"),
        (
            "model: {d_model: 0x" + "f" * 5000 + "}",
            "model.d_model: found int that is too large to show; should be less",
        ),
        ("model: " + "x" * 5000, "..."),
        *((f"model: {{d_model: !!{tag} x}}", "is not valid YAML") for tag in ("int", "float", "bool", "timestamp")),
        ("model: {d_model: !!int ''}", "is not valid YAML"),
        ("model: !!python/object/apply:os.mkdir [x]", "is not valid YAML: could not determine a constructor"),
    ],
    ids=lambda text: text[:30],
)
def test_hostile_yaml(text, said):
    message = refused(parse_config, text)
    assert said in message and len(message) < 500


def test_aliases_have_their_use():
    config = parse_config("data: &d {batch_size: 4}\ncheckpoint: {<<: {keep: 7}}\n")
    assert (config.data.batch_size, config.checkpoint.keep) == (4, 7)


def test_values_are_shown_in_short():
    assert short_repr("a" * 500) == "'" + "a" * 196 + "..."
    assert short_repr(16**5000) == "int that is too large to show"


# --- Data and tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["01", "\u0661", "9" * 5000, "\u00b2"], ids=len)
def test_odd_numbers_of_babi_lines(tmp_path, number):
    (tmp_path / "qa1.txt").write_text(f"{number} Mary went to the kitchen.\n", encoding="utf-8")
    if number == "01":
        assert len(read_babi(tmp_path / "qa1.txt")) == 1
    else:
        assert "a bAbI line is a number, a space and a sentence" in refused(read_babi, tmp_path / "qa1.txt")


def tokenizer_file(path, **model):
    made = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str())
    path.write_text(json.dumps(made | {"model": made["model"] | model}))
    return TokenizerConfig(kind="tokenizers", path=str(path))


def test_a_tokenizer_with_an_id_beyond_reason(tmp_path):
    config = tokenizer_file(tmp_path / "x", vocab={"a": 0, "b": 2**31})
    assert "it has a token of id 2147483648; expected ids below 16777216" in refused(load_tokenizer, config)


def test_a_tokenizer_that_cannot_encode(tmp_path):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path / "x", unk_token="none"))
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a") == [0]
    assert "the model in the file is damaged, and cannot encode a text" in refused(tokenizer.encode, "b")
