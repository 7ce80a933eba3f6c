"""Damaged and hostile inputs of the converter are refused, every problem named; outputs are whole or absent."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from convert_helpers import OFFICIAL, convert, random_llama, random_own, with_keys
from safetensors.numpy import load_file, save_file

import lm2_jax
from lm2_jax import convert_checkpoint
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.config import dump_config, load_config

torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


Q = "model.layers.1.self_attn.q_proj.weight"


def _tensors(change):
    """Damage to the tensors of model.safetensors."""

    def damage(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return damage


def _nan(tensors):
    tensors[Q][3, 3] = np.nan


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _huge_header(path):
    (path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def _name_twice(path):
    file = path / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entry = json.dumps(json.loads(data[8 : 8 + size])[Q])
    header = data[8 : 8 + size].rstrip()[:-1] + f', "{Q}": {entry}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _shards(change):
    """Damage to a directory of shards, whose index `change` may alter."""

    def damage(path):
        tensors = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        weight_map = {name: file for file, inside in parts.items() for name in inside}
        change(weight_map, parts)
        for file, inside in parts.items():
            save_file({name: tensors[name] for name in inside}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


DAMAGED = {
    "a tensor is missing": (_tensors(lambda t: t.pop(Q)), Q),
    "a tensor too many": (_tensors(lambda t: t.update(stranger=np.ones(3, np.float32))), "stranger: is not a tensor"),
    "rotary tables of old exports are not guessed at": (
        _tensors(lambda t: t.update({"model.layers.0.rotary_emb.inv_freq": np.ones(4, np.float32)})),
        "rotary_emb.inv_freq: is not a tensor",
    ),
    "transposed": (_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.copy()})), "transposed?"),
    "another shape": (_tensors(lambda t: t.update({Q: t[Q][:7]})), f"{Q}: found [7, 32]; expected [32, 32]"),
    "integers": (_tensors(lambda t: t.update({Q: t[Q].astype(np.int32)})), f"{Q}: found I32"),
    "double precision": (_tensors(lambda t: t.update({Q: t[Q].astype(np.float64)})), f"{Q}: found F64"),
    "NaN": (_tensors(_nan), f"{Q}: holds NaN"),
    "truncated": (_truncate, "model.safetensors: is no whole safetensors file"),
    "a header of a terabyte": (_huge_header, "model.safetensors: is no whole safetensors file"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: is missing"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json: is no JSON"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "expected an object"),
    "another architecture": (with_keys(model_type="mamba"), "model_type: found 'mamba'"),
    "a missing size": (with_keys(hidden_size=None), "hidden_size: found None"),
    "a negative size": (with_keys(intermediate_size=-3), "intermediate_size: found -3"),
    "biases": (with_keys(attention_bias=True), "attention_bias: found True"),
    "another RoPE": (with_keys(rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn'"),
    "fewer layers than the file has": (with_keys(num_hidden_layers=2), "model.layers.2."),
    "a size beyond all reason": (with_keys(vocab_size=10**15), "vocab_size: found 1000000000000000"),
    "layers beyond all reason": (with_keys(num_hidden_layers=10**7), "num_hidden_layers: found 10000000"),
    "a word for a truth": (with_keys(tie_word_embeddings="yes"), "tie_word_embeddings: found 'yes'"),
    "one name twice in a file": (_name_twice, f"names twice: {Q}"),
    "heads that do not divide": (with_keys(num_key_value_heads=3), "num_kv_heads 3 does not divide"),
    "an index to a file that is not there": (_shards(lambda m, p: m.update({Q: "c.safetensors"})), "c.safetensors"),
    "an index to a file outside": (_shards(lambda m, p: m.update({Q: "../c.safetensors"})), "'../c.safetensors'"),
    "one name in two shards": (
        _shards(lambda m, p: p.update({f: [*names, Q] for f, names in p.items() if Q not in names})),
        f"{Q}: in a.safetensors and again in b.safetensors",
    ),
    "a tensor that the index does not list": (_shards(lambda m, p: m.pop(Q)), f"{Q}: in b.safetensors, not where"),
}


@pytest.fixture(scope="module")
def whole_llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "llama"
    random_llama(path)
    return path


def command(monkeypatch, capsys, *arguments):
    """Exit code and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(convert_checkpoint.main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_huggingface(tmp_path, whole_llama, monkeypatch, capsys, case):
    damage, message = DAMAGED[case]
    shutil.copytree(whole_llama, tmp_path / "in")
    damage(tmp_path / "in")
    flags = ("--from", "huggingface", "--to", "lm2_jax", "--input", tmp_path / "in", "--output", tmp_path / "out")
    code, error = command(monkeypatch, capsys, *flags)
    assert code == 2
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


LM2_DAMAGED = {
    "slots that the bank has not": (
        with_keys(memory_slots=64),
        "model.start_memory.bank: found [5, 32]; expected [64, 32]",
    ),
    "slots beyond all reason": (with_keys(memory_slots=10**9), "model.start_memory.bank: found [5, 32]"),
    "a width beyond all reason": (with_keys(memory_width=10**9), "expected [1000000000]"),
    "another kind": (with_keys(memory_kind="foo"), "memory.kind: found 'foo'"),
    "another convolution": (with_keys(conv_width=3), "model.conv_width: found 3"),
    "no segment length": (with_keys(segment_length=None), "segment_length: found None"),
    "another bank": (
        _tensors(lambda t: t.update({"model.start_memory.bank": t["model.start_memory.bank"] + 1})),
        "model.start_memory.bank: differs from the fixed initial bank",
    ),
    "a gate is missing": (
        _tensors(lambda t: t.pop("model.layers.1.memory.forget_gate.weight")),
        "model.layers.1.memory.forget_gate.weight: is missing",
    ),
}


@pytest.mark.parametrize("case", LM2_DAMAGED)
def test_damaged_lm2(tmp_path, monkeypatch, capsys, case):
    damage, message = LM2_DAMAGED[case]
    convert("lm2_jax", "huggingface", random_own(tmp_path / "ours"), tmp_path / "in")
    damage(tmp_path / "in")
    flags = ("--from", "huggingface", "--to", "lm2_jax", "--input", tmp_path / "in", "--output", tmp_path / "out")
    code, error = command(monkeypatch, capsys, *flags)
    assert code == 2
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "ours"]


def _official_damage(change):
    def damage(path):
        tensors = load_file(path / "state_dict.safetensors")
        change(tensors)
        save_file(tensors, path / "state_dict.safetensors")

    return damage


def _aliases_differ(tensors):
    tensors["model.layers.0.mem_attn.self_attn.k_proj.weight"] += 1


OFFICIAL_DAMAGED = {
    "aliases that differ": (_official_damage(_aliases_differ), "mem_attn.self_attn.k_proj.weight: differs from"),
    "an alias is missing": (
        _official_damage(lambda t: t.pop("model.layers.1.mem_attn.memory_module.attention_mlp.1.bias")),
        "attention_mlp.1.bias: is missing",
    ),
    "no memory_bank": (_official_damage(lambda t: t.pop("memory_bank")), "memory_bank: is missing"),
    "a bank of another size": (
        _official_damage(lambda t: t.update(memory_bank=t["memory_bank"][:, :5])),
        "memory_bank: found [1, 5, 32]",
    ),
    "sizes that differ": (
        with_keys(memory_slots=16),
        "the segment length and the model width to be equal",
    ),
    "no state dict": (lambda path: (path / "state_dict.safetensors").unlink(), "no such file"),
}


@pytest.mark.parametrize("case", OFFICIAL_DAMAGED)
def test_damaged_official(tmp_path, monkeypatch, capsys, case):
    ours = random_own(tmp_path / "ours", *OFFICIAL)
    convert("lm2_jax", "official", ours, tmp_path / "in")
    damage, message = OFFICIAL_DAMAGED[case]
    damage(tmp_path / "in")
    flags = ("--from", "official", "--to", "lm2_jax", "--input", tmp_path / "in", "--output", tmp_path / "out")
    code, error = command(monkeypatch, capsys, *flags)
    assert code == 2
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "ours"]


def test_a_pickle_that_would_run_code_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"memory_bank": _RunsCode()}, file)
    torch.save({"model_state_dict": {"memory_bank": _RunsCode()}}, tmp_path / "evil_zip.pth")
    shutil.copy(Path(random_own(tmp_path / "ours", *OFFICIAL)) / "config.yaml", tmp_path / "x.yaml")
    convert("lm2_jax", "official", tmp_path / "ours", tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path)
    for name in ("evil.pth", "evil_zip.pth"):
        flags = ("--from", "official", "--to", "lm2_jax", "--input", tmp_path / name, "--output", tmp_path / "out")
        code, error = command(monkeypatch, capsys, *flags)
        assert code == 2
        assert f"{name}: is no PyTorch file of plain tensors" in error
        assert not (tmp_path / "code_was_run").exists()
        assert not (tmp_path / "out").exists()


def test_odd_torch_tensors(tmp_path):
    ours = random_own(tmp_path / "ours", *OFFICIAL)
    convert("lm2_jax", "official", ours, tmp_path / "theirs")
    tensors = {"memory_bank": torch.eye(32).to_sparse(), "model.norm.weight": torch.empty(3, device="meta")}
    torch.save(tensors, tmp_path / "theirs" / "odd.pth")
    with pytest.raises(UserError, match=r"sparse, or without numbers of their own: memory_bank, model\.norm\.weight"):
        convert("official", "lm2_jax", tmp_path / "theirs" / "odd.pth", tmp_path / "out")


def test_outputs_that_cannot_be(tmp_path, whole_llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for output in (".", "loop", "file", "file/below", "x" * 300):
        with pytest.raises(UserError, match="--output: "):
            convert("huggingface", "lm2_jax", whole_llama, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_full_disk_leaves_nothing(tmp_path, whole_llama, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lm2_jax.convert.tensors.save_file", no_space)
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        convert("huggingface", "lm2_jax", whole_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_output_that_is_there_is_kept(tmp_path, whole_llama, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    flags = ("--from", "huggingface", "--to", "lm2_jax", "--input", whole_llama, "--output", tmp_path / "out")
    code, error = command(monkeypatch, capsys, *flags)
    assert code == 2
    assert "is there already" in error
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_a_directory_of_ours_points_nowhere_else(tmp_path):
    ours = random_own(tmp_path / "ours")
    text = (ours / "config.yaml").read_text()
    for path in ("/etc/hostname", "../secret"):
        (ours / "config.yaml").write_text(text.replace("kind: stories, path: null", f"kind: tokenizers, path: {path}"))
        with pytest.raises(UserError, match="is not the name of a file here"):
            lm2_jax.load(ours)


def test_a_start_memory_where_there_is_none(tmp_path):
    ours = random_own(tmp_path / "ours", "memory.kind=none")
    save_file({"memory_bank": np.ones((1, 5, 5), np.float32)}, ours / "memory.safetensors")
    with pytest.raises(UserError, match=r"memory\.kind none carries no start memory"):
        lm2_jax.load(ours)


def test_damaged_directory_of_ours(tmp_path):
    """lm2_jax.load refuses what does not fit its config."""
    ours = random_own(tmp_path / "ours")
    config = load_config(ours / "config.yaml")
    (ours / "config.yaml").write_text(
        dump_config(
            config.model_copy(update={"memory": config.memory.model_copy(update={"num_heads": 2, "width": 24})})
        )
    )
    with pytest.raises(UserError, match=r"write_key: found \[2, 32, 32\]; expected \[2, 32, 24\]"):
        lm2_jax.load(ours)
