"""Conversion: there and back to the bit, equal logits on both sides, and everything damaged refused by name."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import convert_checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lm2_jax
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.config import dump_config, load_config, parse_config
from lm2_jax.convert import directory, engine
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.decoding.sampling import generate
from lm2_jax.model import build_model

torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")

GOLDEN = Path(__file__).parent / "data" / "golden"
V = 61


def convert(source, target, path, output, *overrides, dtype="float32"):
    convert_checkpoint.convert(source, target, Path(path), Path(output), dtype, list(overrides))
    return Path(output)


def random_own(path, *overrides, noise=0.3, seed=0):
    """A converted directory of a model away from its initialisation."""
    base = ("model.d_model=32", "model.d_ff=48", "model.num_layers=2", "model.num_kv_heads=2", "memory.num_slots=5")
    where = ("data.source=bin", "data.path=x.bin", "data.segment_length=16")
    config = parse_config("", (f"model.vocab_size={V}", *where, *base, *overrides))
    model, key = build_model(config), jax.random.key(seed)
    tokens_BT = jnp.zeros((1, config.data.segment_length), jnp.int32)
    params = jax.jit(lambda key: model.init(key, tokens_BT, model.init_memory(1))["params"])(key)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    params = tree.unflatten([x + noise * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    checkpoint = engine.Checkpoint(config, engine.from_arrays(params, path))
    with directory.new_directory(path) as partial:
        directory.write(checkpoint, partial, lambda items, title: items)
    return path


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
        assert array.tobytes() == expected[name].tobytes(), name


# --- The official code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["G1", "G2", "G3"])
def test_official_there_and_back(tmp_path, name):
    """To the bit: every key, shape and dtype, aliases and memory_bank included; also read from a PyTorch file."""
    convert("official", "lm2_jax", GOLDEN / name, tmp_path / "ours")
    back = convert("lm2_jax", "official", tmp_path / "ours", tmp_path / "back")
    expected = load_file(GOLDEN / name / "state_dict.safetensors")
    assert_same_tensors(load_file(back / "state_dict.safetensors"), expected)
    theirs, ours = (json.loads((d / "config.json").read_text()) for d in (GOLDEN / name, back))
    assert theirs == ours

    checkpoint = {"iteration": 7, "model_state_dict": {k: torch.tensor(v) for k, v in expected.items()}, "lr": 0.1}
    torch.save(checkpoint, tmp_path / "ckpt_iter_7.pth")
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    convert("official", "lm2_jax", tmp_path / "ckpt_iter_7.pth", tmp_path / "from_torch")
    assert_same_tensors(*(load_file(tmp_path / d / "params.safetensors") for d in ("from_torch", "ours")))


OFFICIAL = ("memory={kind: official, num_slots: 32, num_heads: 4}", "data.segment_length=32")


def test_official_start_memory_is_loaded(tmp_path):
    """Without one it is the identity in the official file, and what that file holds is what load_memory gives."""
    ours = random_own(tmp_path / "ours", *OFFICIAL)
    assert lm2_jax.load_memory(ours) is None
    theirs = convert("lm2_jax", "official", ours, tmp_path / "theirs")
    state = load_file(theirs / "state_dict.safetensors")
    np.testing.assert_array_equal(state["memory_bank"], np.eye(32)[None])
    state["memory_bank"] = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    save_file(state, theirs / "state_dict.safetensors")
    again = convert("official", "lm2_jax", theirs, tmp_path / "again")
    np.testing.assert_array_equal(lm2_jax.load_memory(again), state["memory_bank"])
    assert_same_tensors(load_file(again / "params.safetensors"), load_file(ours / "params.safetensors"))


def test_official_has_no_place_for_other_memories(tmp_path):
    ours = random_own(tmp_path / "ours")
    with pytest.raises(UserError, match="no place for bank_blocks/memory/bank_norm"):
        convert("lm2_jax", "official", ours, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


# --- Llama ---------------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMAS = {
    "tied, grouped": {"tie_word_embeddings": True, "num_key_value_heads": 2, "rope_parameters": PLAIN},
    "untied, llama3 scaling": {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_parameters": LLAMA3},
    "tied, llama3 scaling": {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_parameters": LLAMA3},
    "sharded, heads of another width": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 2,
        "rope_parameters": PLAIN,
        "head_dim": 16,
    },
}


def random_llama(path, name="untied, llama3 scaling", seed=0, std=0.25, **save):
    """A LlamaForCausalLM with large random weights, saved."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=V, max_position_embeddings=256, initializer_range=std, **sizes, **LLAMAS[name]
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.save_pretrained(path, **save)
    return llama


def torch_logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)), **kwargs).logits.float().numpy()


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(tmp_path, name):
    """Equal logits and greedy tokens; there and back to the bit; the exported directory needs no remote code."""
    sharded = {"max_shard_size": "30KB"} if name.startswith("sharded") else {}
    llama = random_llama(tmp_path / "llama", name, **sharded)
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists() == bool(sharded)
    convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")
    model, params = lm2_jax.load(tmp_path / "ours")
    tokens_BT = random_tokens((2, 90))
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, tokens_BT, model.init_memory(2))
    np.testing.assert_allclose(logits_BTV, torch_logits(llama, tokens_BT), atol=1e-4)

    prompts = [tokens_BT[0, :40].tolist(), tokens_BT[1, :23].tolist()]
    settings = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for prompt, continued in zip(prompts, generate(model, params, prompts, max_new_tokens=60), strict=True):
        inputs = {"inputs": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        assert llama.generate(**inputs, **settings)[0, len(prompt) :].tolist() == continued

    convert("lm2_jax", "huggingface", tmp_path / "ours", tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.py"))
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is transformers.LlamaForCausalLM
    assert not any(report.values()), report
    for (key, tensor), (key_2, tensor_2) in zip(llama.state_dict().items(), back.state_dict().items(), strict=True):
        assert key == key_2
        assert torch.equal(tensor, tensor_2), key
    np.testing.assert_array_equal(torch_logits(back, tokens_BT), torch_logits(llama, tokens_BT))


def test_what_came_with_a_llama_leaves_with_it(tmp_path):
    """Settings that we have no place for: end tokens, longest text, generation settings, chat template."""
    random_llama(tmp_path / "llama")
    extra = {"eos_token_id": [1, 2], "bos_token_id": 0, "max_position_embeddings": 131072}
    _settings(**extra)(tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 2]}')
    (tmp_path / "llama" / "chat_template.jinja").write_text("{{ messages }}")
    convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")
    convert("lm2_jax", "huggingface", tmp_path / "ours", tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert extra.items() <= settings.items()
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "llama" / name).read_bytes()


def test_bfloat16_llama(tmp_path):
    """Half-size weights come in exactly, and go out exactly again; rounded where they were float32."""
    llama = random_llama(tmp_path / "float32").to(torch.bfloat16)
    llama.save_pretrained(tmp_path / "llama")
    convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")
    back = convert("lm2_jax", "huggingface", tmp_path / "ours", tmp_path / "back", dtype="bfloat16")
    convert("huggingface", "lm2_jax", tmp_path / "float32", tmp_path / "wide")
    rounded = convert("lm2_jax", "huggingface", tmp_path / "wide", tmp_path / "rounded", dtype="bfloat16")
    for output in (back, rounded):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(output)
        assert loaded.dtype == torch.bfloat16
        for (key, tensor), other in zip(llama.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), key


def test_shards_of_ours(tmp_path):
    """Shards of about the size asked for, with their index, hold the same as one file."""
    rng = np.random.default_rng(0)
    arrays = {f"layer.{i}.weight": rng.normal(size=(8, i + 1)).astype(np.float32) for i in range(9)}

    write_tensors(tmp_path, "model", arrays.items(), shard_bytes=300)
    assert len(list(tmp_path.glob("model-0000?-of-00006.safetensors"))) == 6
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    assert_same_tensors({name: t.read() for name, t in open_tensors(tmp_path, "model").items()}, arrays)
    np.testing.assert_array_equal(
        open_tensors(tmp_path, "model")["layer.8.weight"].read(3), arrays["layer.8.weight"][3]
    )


# --- Damaged inputs ------------------------------------------------------------------------------------------------


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


def _settings(**changes):
    """Damage to config.json; None takes a key out."""

    def damage(path):
        settings = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

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
    "another architecture": (_settings(model_type="mamba"), "model_type: found 'mamba'"),
    "a missing size": (_settings(hidden_size=None), "hidden_size: found None"),
    "a negative size": (_settings(intermediate_size=-3), "intermediate_size: found -3"),
    "biases": (_settings(attention_bias=True), "attention_bias: found True"),
    "another RoPE": (_settings(rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn'"),
    "fewer layers than the file has": (_settings(num_hidden_layers=2), "model.layers.2."),
    "a size beyond all reason": (_settings(vocab_size=10**15), "vocab_size: found 1000000000000000"),
    "layers beyond all reason": (_settings(num_hidden_layers=10**7), "num_hidden_layers: found 10000000"),
    "a word for a truth": (_settings(tie_word_embeddings="yes"), "tie_word_embeddings: found 'yes'"),
    "one name twice in a file": (_name_twice, f"names twice: {Q}"),
    "heads that do not divide": (_settings(num_key_value_heads=3), "num_kv_heads 3 does not divide"),
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
    "slots that the bank has not": (_settings(memory_slots=64), "model.initial_bank: found [5, 32]; expected [64, 32]"),
    "slots beyond all reason": (_settings(memory_slots=10**9), "model.initial_bank: found [5, 32]"),
    "a width beyond all reason": (_settings(memory_width=10**9), "expected [1000000000]"),
    "another kind": (_settings(memory_kind="foo"), "memory.kind: found 'foo'"),
    "another convolution": (_settings(conv_width=3), "model.conv_width: found 3"),
    "no segment length": (_settings(segment_length=None), "segment_length: found None"),
    "another bank": (
        _tensors(lambda t: t.update({"model.initial_bank": t["model.initial_bank"] + 1})),
        "model.initial_bank: is another start",
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
    "sizes that differ": (_settings(memory_slots=16), "needs slots, segment length and model width to be equal"),
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
        (ours / "config.yaml").write_text(
            text.replace("{kind: stories, path: null}", f"{{kind: tokenizers, path: {path}}}")
        )
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
