"""Adapters: what was trained, alone, is with its base what the merged export is; in PyTorch, in peft and here."""

import json
import shutil

import jax
import numpy as np
import pytest
from convert_helpers import (
    V,
    convert,
    own_directory,
    random_own,
    random_tokens,
    torch,
    torch_logits,
    transformers,
    with_keys,
)
from export_helpers import works
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import quick_training, tiny_config
from safetensors.numpy import load_file, save_file

import lm2_jax
from lm2_jax.common.errors import UserError
from lm2_jax.config import load_config, replace
from lm2_jax.convert import engine
from lm2_jax.loading import load_weights
from lm2_jax.model import build_model, lora
from lm2_jax.model.trained import trained_names
from lm2_jax.segments import run_segments
from lm2_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("modules_of_transformers")

EVERYWHERE = {"rank": 2, "alpha": 6, "targets": ["attention", "mlp", "embedding"]}
LM2 = {"kind": "lm2", "first_layer": 1, "num_layers": 1, "width": 8}
# (tied, changes of the base's config)
CASES = {
    "memory and LoRA on tied tables": (
        True,
        {"memory": LM2, "model": {"lora": EVERYWHERE}, "optim": {"train": ["memory", "lora"]}},
    ),
    "memory and LoRA on two tables, with a window": (
        False,
        {
            "memory": LM2,
            "model": {"lora": EVERYWHERE | {"targets": ["mlp", "head"]}, "window": 12, "sinks": 2, "conv_width": 4},
            "optim": {"train": ["memory", "lora", "*/conv*"]},
        },
    ),
    "memory and some of the weights": (True, {"memory": LM2, "optim": {"train": ["memory", "blocks/mlp/*"]}}),
    "LoRA in some of the blocks": (
        True,
        {"memory": LM2, "model": {"lora": EVERYWHERE}, "optim": {"train": ["memory", "bank_blocks/*_lora_?"]}},
    ),
    "LoRA and a window": (
        True,
        {"model": {"lora": EVERYWHERE, "window": 8, "sinks": 1}, "optim": {"train": ["lora"]}},
    ),
}
PURE = {
    "model": {"lora": EVERYWHERE | {"targets": ["attention", "embedding", "head"]}},
    "optim": {"train": ["lora"]},
}


def adapted(path, tied, changes):
    """Directories `base`, `trained` on it, `merged` of that; `hf` of the base and `hf_merged`; and the `adapter`."""
    memory_less = ("memory.kind=none", f"model.tie_embeddings={str(tied).lower()}")
    base = random_own(path / "base", *memory_less, "model.num_layers=3", noise=0.1)
    config = replace(load_config(base / "config.yaml"), **changes)
    model = build_model(config)
    params = flatten_dict(load_weights(str(base), model, model.init_params(jax.random.key(1))), sep="/")
    rng = np.random.default_rng(2)
    for name in trained_names(model, config.optim.train):
        params[name] = params[name] + 0.1 * rng.normal(size=params[name].shape).astype(np.float32)
    params = unflatten_dict(params, sep="/")
    trained = own_directory(path / "trained", config, params)
    merged = convert("lm2_jax", "lm2_jax", trained, path / "merged")
    for ours, theirs in ((base, "hf"), (merged, "hf_merged")):
        convert("lm2_jax", "huggingface", ours, path / theirs)
    convert("lm2_jax", "adapter", trained, path / "adapter")
    return path


def assert_close_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)


def onto(path, target, output, base="hf"):
    return convert_onto(path / "adapter", path / base, target, path / output)


def convert_onto(adapter, base, target, output):
    lm2_jax.convert_checkpoint.convert("adapter", target, adapter, output, "float32", [], base)
    return output


def from_adapter(adapter, base, **kwargs):
    get_class = transformers.dynamic_module_utils.get_class_from_dynamic_module
    return get_class("modeling_lm2.LM2ForCausalLM", adapter).from_adapter(adapter, base, **kwargs)


def auto(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("case"), *CASES[request.param])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("one"), *CASES["memory and LoRA on tied tables"])


@pytest.fixture
def copy(one, tmp_path):
    return shutil.copytree(one, tmp_path / "copy")


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("pure"), False, PURE)


# --- With its base it is the whole model ---------------------------------------------------------------------------


def test_in_pytorch(case):
    tokens = random_tokens((2, 40))
    expected = torch_logits(auto(case / "hf_merged"), tokens)
    model = from_adapter(str(case / "adapter"), str(case / "hf"))
    assert not model.training and not hasattr(model.config, "adapter")
    np.testing.assert_allclose(torch_logits(model, tokens), expected, atol=1e-4)
    base = auto(case / "hf")
    assert np.abs(torch_logits(base, tokens) - expected).max() > 0.1
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    again = from_adapter(str(case / "adapter"), base, dtype=torch.float64)
    assert again.dtype == torch.float64
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_the_whole_of_a_converted_directory(case, tmp_path):
    """Its additions are merged, as those of a run are."""
    whole = convert("lm2_jax", "lm2_jax", case / "trained", tmp_path / "whole")
    assert load_config(whole / "config.yaml").model.lora is None
    tokens = random_tokens((2, 1, 16))
    expected, found = (
        run_segments(model, params, tokens, model.init_memory(2, params))[0]
        for model, params in map(lm2_jax.load, (case / "trained", whole))
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    theirs = auto(convert("lm2_jax", "huggingface", case / "trained", tmp_path / "theirs"))
    np.testing.assert_allclose(torch_logits(theirs, tokens[:, 0]), expected[:, 0], atol=1e-4)


@pytest.mark.parametrize("base", ["hf", "base"])
def test_here(case, base, tmp_path):
    whole = onto(case, "lm2_jax", tmp_path / "whole", base)
    assert_close_tensors(load_file(whole / "params.safetensors"), load_file(case / "merged" / "params.safetensors"))
    theirs = onto(case, "huggingface", tmp_path / "theirs", base)
    assert_close_tensors(load_file(theirs / "model.safetensors"), load_file(case / "hf_merged" / "model.safetensors"))
    settings, expected = (json.loads((d / "config.json").read_text()) for d in (theirs, case / "hf_merged"))
    assert settings == expected


def test_additions_alone_are_pefts(pure, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt)")
    tokens = random_tokens((2, 12))
    expected = torch_logits(auto(pure / "hf_merged"), tokens)
    model = peft.PeftModel.from_pretrained(auto(pure / "hf"), pure / "adapter").eval()
    np.testing.assert_allclose(torch_logits(model, tokens), expected, atol=1e-4)
    np.testing.assert_allclose(torch_logits(model.merge_and_unload(), tokens), expected, atol=1e-4)
    assert not (pure / "adapter" / "config.json").exists()
    whole = onto(pure, "lm2_jax", tmp_path / "whole")
    assert_close_tensors(load_file(whole / "params.safetensors"), load_file(pure / "merged" / "params.safetensors"))


def test_what_peft_saves_is_read(pure, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt)")
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(auto(pure / "hf"), settings).eval()
    model.save_pretrained(tmp_path / "saved")
    theirs = auto(convert_onto(tmp_path / "saved", pure / "hf", "huggingface", tmp_path / "whole"))
    tokens = random_tokens((2, 12))
    np.testing.assert_allclose(torch_logits(theirs, tokens), torch_logits(model, tokens), atol=1e-4)


def test_a_base_with_additions_of_its_own(pure, tmp_path):
    found, expected = (
        load_file(works(onto, pure, "lm2_jax", tmp_path / base, base) / "params.safetensors")
        for base in ("trained", "merged")
    )
    assert_close_tensors(found, expected)


def test_a_run_names_its_base_and_its_training(tmp_path):
    """A base that was frozen in bfloat16 is the one that the run started from."""
    base = tiny_config(tmp_path / "base", "memory.kind=none", "train.steps=2")
    changes = ("optim.train=[memory, lora]", "model.lora.rank=2", "train.frozen_dtype=bfloat16", "train.steps=2")
    config = tiny_config(tmp_path / "run", *changes, f"train.init_from={base.train.run_dir}")
    with quick_training():
        train(base)
        train(config)
    adapter = convert("lm2_jax", "adapter", tmp_path / "run", tmp_path / "adapter", dtype="bfloat16")
    about = json.loads((adapter / "config.json").read_text())["adapter"]
    assert (about["base"], about["lora_rank"]) == (base.train.run_dir, 2)
    card = (adapter / "README.md").read_text()
    assert base.train.run_dir in card and "trained for 2 steps" in card and "from_adapter" in card
    whole = convert_onto(adapter, tmp_path / "base", "lm2_jax", tmp_path / "whole")
    merged = convert("lm2_jax", "lm2_jax", tmp_path / "run", tmp_path / "merged")
    found, expected = (load_file(path / "params.safetensors") for path in (whole, merged))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=5e-3)


# --- What it holds -------------------------------------------------------------------------------------------------


def test_it_holds_what_was_trained(one):
    tensors = load_file(one / "adapter" / "adapter_model.safetensors")
    config = load_config(one / "trained" / "config.yaml")
    names = trained_names(build_model(config), config.optim.train)
    shapes = engine.abstract_params(config)
    bank = tensors.pop("model.start_memory.bank")
    assert bank.shape == (5, 8)
    assert sum(array.size for array in tensors.values()) == sum(shapes[name].size for name in names)
    assert tensors["model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (2, 32)
    assert tensors["model.embed_tokens.lora_embedding_A"].shape == (2, V)
    assert not (one / "adapter" / "model.safetensors").exists()


def test_additions_that_add_nothing_are_left_out(tmp_path):
    path = adapted(tmp_path, *CASES["LoRA in some of the blocks"])
    names = load_file(path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in names if "lora_A" in name} == {"1"}
    assert "model.embed_tokens.lora_embedding_A" not in names


@pytest.mark.parametrize("name", ["adopt_smollm2", "adopt_llama_3_2_1b"])
def test_share_of_real_models(name):
    """Less than a tenth of the whole, as the merged export has it."""
    config = load_config(f"configs/{name}.yaml")
    shapes = engine.abstract_params(config)
    trained = sum(shapes[name].size for name in trained_names(build_model(config), config.optim.train))
    whole = sum(shape.size for path, shape in shapes.items() if not lora.is_addition(path))
    assert trained / whole < 0.1


# --- What does not fit ---------------------------------------------------------------------------------------------


def test_nothing_frozen(one, tmp_path):
    with pytest.raises(UserError, match=r"optim\.train \['all'\] trained all of the model.*--to huggingface"):
        convert("lm2_jax", "adapter", one / "base", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_peft_would_add_twice(tmp_path):
    with pytest.raises(UserError, match=r"embedding, whose table is the head, too .*twice"):
        adapted(tmp_path, True, {"model": {"lora": EVERYWHERE}, "optim": {"train": ["lora"]}})
    assert not (tmp_path / "adapter").exists()


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


MEMORY = "model.layers.1.memory.read_query.weight"
HALF = "model.layers.1.self_attn.q_proj.lora_B.weight"
DAMAGES = {
    f"{MEMORY}: is missing": lambda t: t.pop(MEMORY),
    f"{MEMORY}: found .*expected": lambda t: t.update({MEMORY: t[MEMORY][:3]}),
    "foreign: is not a tensor of this model": lambda t: t.update(foreign=t[MEMORY]),
    r"model.layers.1.self_attn.q_proj.lora_": lambda t: t.pop(HALF),
    r"model.layers.1.self_attn.q_proj.*: found .*expected": lambda t: t.update({HALF: t[HALF][:5]}),
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_damaged_adapters(copy, expected):
    edit(copy / "adapter" / "adapter_model.safetensors", DAMAGES[expected])
    with pytest.raises(UserError, match=expected):
        onto(copy, "lm2_jax", "x")
    with pytest.raises(ValueError, match=expected):
        from_adapter(str(copy / "adapter"), str(copy / "hf"))


def test_bases_of_other_shapes(one, tmp_path):
    base = random_own(tmp_path / "base", "memory.kind=none", "model.num_layers=4", "model.d_ff=64")
    theirs = convert("lm2_jax", "huggingface", base, tmp_path / "hf")
    expected = r".*model.layers.0.mlp.up_proj.weight: found \[64, 32\]; expected \[48, 32\].*"
    for where in (base, theirs):
        with pytest.raises(UserError, match=f"(?s){where}: {expected}layers.3.* is not a tensor of this model"):
            convert_onto(one / "adapter", where, "lm2_jax", tmp_path / "x")
    with pytest.raises(ValueError, match=f"(?s){expected}"):
        from_adapter(str(one / "adapter"), str(theirs))


def test_bases_with_other_weights(copy):
    edit(copy / "hf" / "model.safetensors", lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 1.1}))
    with pytest.raises(UserError, match=r"hf has other weights than the model that .*adapter was trained on"):
        onto(copy, "lm2_jax", "x")
    with pytest.raises(ValueError, match="other weights than the one the adapter was trained on"):
        from_adapter(str(copy / "adapter"), str(copy / "hf"))


def test_a_base_in_bfloat16_is_the_same(one, tmp_path):
    base = convert("lm2_jax", "huggingface", one / "base", tmp_path / "hf", dtype="bfloat16")
    convert_onto(one / "adapter", base, "lm2_jax", tmp_path / "whole")
    assert from_adapter(str(one / "adapter"), str(base)).dtype == torch.float32


def test_a_base_with_a_memory(one, tmp_path):
    with pytest.raises(UserError, match=r"--base: .* is no Llama alone; found bank_blocks/memory"):
        convert_onto(one / "adapter", one / "merged", "lm2_jax", tmp_path / "x")


@pytest.mark.parametrize(
    ("source", "target", "base", "overrides", "expected"),
    [
        ("adapter", "lm2_jax", None, (), "give --from adapter and --base, or neither"),
        ("lm2_jax", "huggingface", "hf", (), "give --from adapter and --base, or neither"),
        ("adapter", "lm2_jax", "nowhere", (), "--base: .*nowhere is not there"),
        ("huggingface", "adapter", None, (), "--to adapter needs --from lm2_jax"),
        ("adapter", "lm2_jax", "hf", ("model.d_ff=3",), "--set: adapter has its settings"),
    ],
)
def test_options_that_do_not_go_together(one, tmp_path, source, target, base, overrides, expected):
    base = base and one / base
    with pytest.raises(UserError, match=expected):
        lm2_jax.convert_checkpoint.convert(
            source, target, one / "adapter", tmp_path / "x", "float32", list(overrides), base
        )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": None}, "adapter: found None; expected what --to adapter writes there"),
        ({"adapter": {"base_sha256": "0", "lora_rank": 0, "lora_alpha": 1}}, "lora_rank: found 0; expected a positive"),
    ],
)
def test_settings_that_are_damaged(copy, changes, expected):
    with_keys(**changes)(copy / "adapter")
    with pytest.raises(UserError, match=expected):
        onto(copy, "lm2_jax", "x")


def test_other_kinds_of_peft(pure, tmp_path):
    adapter = shutil.copytree(pure / "adapter", tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True, "r": "two"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"(?s)use_dora: found True; only False is supported.*r: found 'two'"):
        convert_onto(adapter, pure / "hf", "lm2_jax", tmp_path / "x")
