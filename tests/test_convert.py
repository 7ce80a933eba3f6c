"""Conversion: there and back to the bit, equal logits on both sides, and everything damaged refused by name."""

import json
import shutil

import jax
import numpy as np
import pytest
from convert_helpers import (
    GOLDEN,
    LLAMA3,
    LLAMAS,
    OFFICIAL,
    assert_same_tensors,
    convert,
    random_llama,
    random_own,
    random_tokens,
    torch_logits,
    with_keys,
)
from safetensors.numpy import load_file, save_file

import lm2_jax
from lm2_jax.common.errors import UserError
from lm2_jax.convert.llama_config import from_llama
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.decoding.sampling import generate

torch = pytest.importorskip("torch", reason="torch is not installed (requirements-dev.txt)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")

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


def test_every_transformers_finds_its_rope(tmp_path):
    """Version 5 reads rope_parameters; those before it read rope_theta and rope_scaling, and default in silence."""
    random_llama(tmp_path / "llama", "untied, llama3 scaling")
    convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")
    convert("lm2_jax", "huggingface", tmp_path / "ours", tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert (settings.get("rope_theta"), settings.get("rope_scaling")) == (5e5, scaling)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").rope_parameters == LLAMA3


OLD = {"rope_theta": 5e5, "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}}


@pytest.mark.parametrize("form", [OLD, {"rope_parameters": LLAMA3}, OLD | {"rope_parameters": LLAMA3}], ids=len)
def test_rope_in_either_form_or_both(form):
    problems = []
    model = from_llama(form, problems)["model"]
    assert not [problem for problem in problems if "rope" in problem]
    assert {"rope_type": "llama3", "rope_theta": model["rope_theta"]} | model["rope_scaling"] == LLAMA3


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"rope_theta": 1e4}, "rope_theta and rope_parameters.rope_theta: found 10000.0 and 500000.0"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_parameters and rope_scaling: found {'factor': 8.0"),
        ({"rope_scaling": OLD["rope_scaling"] | {"factor": 32.0}}, "rope_parameters and rope_scaling: found {'factor'"),
    ],
)
def test_forms_of_rope_that_contradict_each_other(form, problem):
    problems = []
    from_llama({"rope_parameters": LLAMA3} | form, problems)
    assert any(found.startswith(problem) for found in problems), problems


def test_what_came_with_a_llama_leaves_with_it(tmp_path):
    """Settings that we have no place for: end tokens, longest text, generation settings, chat template."""
    random_llama(tmp_path / "llama")
    extra = {"eos_token_id": [1, 2], "bos_token_id": 0, "max_position_embeddings": 131072}
    with_keys(**extra)(tmp_path / "llama")
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
