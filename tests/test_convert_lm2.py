"""Our own models in transformers: equal logits and tokens, warm starts from a Llama, tokenizers, and back again."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convert_helpers import (
    V,
    assert_same_tensors,
    convert,
    left_padded,
    random_llama,
    random_own,
    random_tokens,
    torch,
    torch_logits,
    transformers,
)
from helpers import quick_training
from safetensors.numpy import load_file, save_file

import lm2_jax
from lm2_jax.common.errors import UserError
from lm2_jax.config import TokenizerConfig, parse_config
from lm2_jax.convert.tokenizer_files import special_ids, write_tokenizer
from lm2_jax.decoding.sampling import generate
from lm2_jax.loading import load_run
from lm2_jax.model.decoder import STACKS
from lm2_jax.segments import run_segments
from lm2_jax.tokenizer import load_tokenizer
from lm2_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("modules_of_transformers")
BOOKS = Path(__file__).parents[2] / "shared" / "data" / "books"
T = 128
MODELS = {
    "lm2": ("model.conv_width=4",),
    "lm2 of other sizes": (
        "memory.width=24",
        "memory.num_layers=1",
        "memory.gates=independent",
        "memory.num_slots=40",
        "model.tie_embeddings=false",
        "model.rope_scaling={original_max_position_embeddings: 64, factor: 8}",
    ),
    "banks in the middle": ("model.num_layers=4", "memory.first_layer=1", "memory.num_layers=2"),
    "lm2 with a router": ("memory.write=top_k", "memory.num_slots=6"),
    "armt": (
        "memory.kind=armt",
        "memory.width=12",
        "memory.num_slots=3",
        "memory.first_layer=1",
        "memory.num_layers=1",
        "model.num_layers=3",
        "model.conv_width=4",
    ),
    "delta": ("memory.kind=delta", "memory.width=12", "memory.num_heads=2", "memory.num_layers=1"),
    "rmt": ("memory.kind=rmt",),
    "rmt with convolution": ("memory.kind=rmt", "model.conv_width=4"),
    "none with convolution": ("memory.kind=none", "model.conv_width=8"),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(our directory, our model and parameters, the same in transformers)."""
    path = tmp_path_factory.mktemp("pair")
    # Further from its initialisation a recurrent model is chaotic, and float noise grows without bound
    ours = random_own(path / "ours", f"data.segment_length={T}", *MODELS[request.param], noise=0.1)
    theirs = convert("lm2_jax", "huggingface", ours, path / "theirs")
    return ours, *lm2_jax.load(ours), loaded(theirs)


def loaded(path):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def test_logits_over_segments(pair):
    """640 tokens at once are five segments of ours."""
    _, model, params, theirs = pair
    tokens_BT = random_tokens((2, 5 * T))
    run = jax.jit(lambda params, tokens_BST, memory: run_segments(model, params, tokens_BST, memory)[0])
    expected = run(params, tokens_BT.reshape(2, 5, T), model.init_memory(2, params)).reshape(2, 5 * T, V)
    np.testing.assert_allclose(torch_logits(theirs, tokens_BT), expected, atol=1e-4)


def test_generate_is_ours(pair):
    """200 tokens over segment ends: alone and in a left-padded batch; a few without the cache, over a segment's end."""
    _, model, params, theirs = pair
    prompts = [random_tokens(length, seed).tolist() for seed, length in enumerate((3 * T + 5, 37))]
    expected = generate(model, params, prompts, max_new_tokens=200)
    batch, mask = left_padded(prompts)
    settings = {"max_new_tokens": 200, "do_sample": False, "pad_token_id": 0}
    found = theirs.generate(batch, attention_mask=mask, **settings)
    assert found[:, batch.shape[1] :].tolist() == expected
    alone = theirs.generate(torch.tensor([prompts[1]]), attention_mask=mask[1:, -len(prompts[1]) :], **settings)
    assert alone[0, len(prompts[1]) :].tolist() == expected[1]
    read = [T - 6 - len(prompt) % T for prompt in prompts]
    batch, mask = left_padded([prompt + new[:n] for prompt, new, n in zip(prompts, expected, read, strict=True)])
    slow = theirs.generate(batch, attention_mask=mask, use_cache=False, **settings | {"max_new_tokens": 12})
    assert slow[:, batch.shape[1] :].tolist() == [new[n : n + 12] for new, n in zip(expected, read, strict=True)]


def test_beams_and_sampling(pair):
    """The same with and without the cache, which is reordered and repeated; sampling repeats itself under a seed."""
    _, _, _, theirs = pair
    batch = torch.tensor(random_tokens((2, T - 5)))
    settings = {"attention_mask": torch.ones_like(batch), "max_new_tokens": 12, "pad_token_id": 0}
    beams = {**settings, "num_beams": 3, "do_sample": False}
    assert torch.equal(theirs.generate(batch, **beams), theirs.generate(batch, use_cache=False, **beams))
    drawn = []
    for cached in (True, False):
        torch.manual_seed(0)
        drawn.append(theirs.generate(batch, do_sample=True, top_k=9, use_cache=cached, **settings))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], theirs.generate(batch, do_sample=True, top_k=9, **settings))


def test_loss_and_gradients(pair):
    """Labels in the last segment alone: the loss is the shifted one, and trains what was written before."""
    _, model, params, theirs = pair
    tokens_BT = random_tokens((2, 3 * T))
    labels = torch.tensor(tokens_BT).long()
    labels[:, : 2 * T + 1] = -100
    theirs.zero_grad()
    loss = theirs(torch.tensor(tokens_BT), labels=labels).loss
    loss.backward()

    def objective(params):
        logits_BSTV, _ = run_segments(model, params, tokens_BT.reshape(2, 3, T), model.init_memory(2, params))
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BSTV[:, -1, :-1], tokens_BT[:, 2 * T + 1 :])
        return jnp.mean(nll_BT)

    expected, gradients = jax.jit(jax.value_and_grad(objective))(params)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-5)
    stack = next(name for name in STACKS if name in gradients)
    query = theirs.model.layers[0].self_attn.q_proj.weight.grad.numpy().T
    np.testing.assert_allclose(query, gradients[stack]["attention"]["query"][0], atol=1e-5 + 1e-3 * np.abs(query).max())
    for name, parameter in theirs.named_parameters():
        assert torch.any(parameter.grad != 0), name
    theirs.zero_grad()


def test_there_and_back(pair, tmp_path):
    """To the bit; and as transformers saves it again."""
    ours, _, _, theirs = pair
    theirs.save_pretrained(tmp_path / "saved")
    convert("huggingface", "lm2_jax", tmp_path / "saved", tmp_path / "back")
    assert_same_tensors(*(load_file(path / "params.safetensors") for path in (tmp_path / "back", ours)))
    before, after = (load_run(path).config for path in (ours, tmp_path / "back"))
    assert before.memory.kind == after.memory.kind
    assert before.model.model_copy(update={"head_dim": 8}) == after.model
    assert before.spec.memory_width == after.spec.memory_width


def test_features(pair):
    """AutoModel is the decoder without its head."""
    ours, _, _, theirs = pair
    path, tokens = ours.parent / "theirs", torch.tensor(random_tokens((2, T + 5)))
    assert "AutoModel" in json.loads((path / "config.json").read_text())["auto_map"]
    decoder = transformers.AutoModel.from_pretrained(path, trust_remote_code=True)
    with torch.no_grad():
        features = decoder(tokens).last_hidden_state
        assert torch.equal(theirs.lm_head(features), theirs(tokens).logits)


def test_former_names_are_read(pair, tmp_path):
    """A directory written when the start memory's tensors belonged to the decoder itself."""
    ours, _, _, _ = pair
    former = {"model.start_memory.bank": "model.initial_bank", "model.start_memory.tokens": "model.memory_tokens"}
    shutil.copytree(ours.parent / "theirs", tmp_path / "former")
    tensors = load_file(tmp_path / "former" / "model.safetensors")
    renamed = {former.get(name, name): x for name, x in tensors.items()}
    save_file(renamed, tmp_path / "former" / "model.safetensors")
    convert("huggingface", "lm2_jax", tmp_path / "former", tmp_path / "back")
    assert_same_tensors(*(load_file(path / "params.safetensors") for path in (tmp_path / "back", ours)))


def test_official_in_transformers(tmp_path):
    """Whole segments, bank from block to block; no generation, no padding."""
    sizes = ("memory={kind: official, num_slots: 32, num_heads: 4}", "data.segment_length=32")
    ours = random_own(tmp_path / "ours", *sizes)
    theirs = loaded(convert("lm2_jax", "huggingface", ours, tmp_path / "theirs"))
    model, params = lm2_jax.load(ours)
    tokens_BT = random_tokens((2, 96))
    logits, _ = run_segments(model, params, tokens_BT.reshape(2, 3, 32), model.init_memory(2))
    np.testing.assert_allclose(torch_logits(theirs, tokens_BT), logits.reshape(2, 96, V), atol=1e-4)
    with pytest.raises(NotImplementedError, match="cannot generate"):
        theirs.generate(torch.tensor(tokens_BT))
    with pytest.raises(ValueError, match="whole segments of 32 tokens"):
        theirs(torch.tensor(tokens_BT[:, :40]))
    back = convert("huggingface", "official", tmp_path / "theirs", tmp_path / "back")
    direct = convert("lm2_jax", "official", ours, tmp_path / "direct")
    for name, array in load_file(direct / "state_dict.safetensors").items():
        np.testing.assert_array_equal(load_file(back / "state_dict.safetensors")[name], array, name)


def test_segments_of_a_curriculum(tmp_path):
    """An exported model reads by the segments it was trained on last."""
    stages = "train.curriculum=[{segments: 2, segment_length: 8, steps: 1}, {segments: 1, segment_length: 24}]"
    ours = random_own(tmp_path / "ours", stages, noise=0.1)
    theirs = loaded(convert("lm2_jax", "huggingface", ours, tmp_path / "theirs"))
    assert theirs.config.segment_length == 24
    prompt = random_tokens(20).tolist()
    expected = generate(*lm2_jax.load(ours), [prompt], max_new_tokens=20)
    inputs = torch.tensor([prompt])
    settings = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found = theirs.generate(inputs, **settings)
    assert found[0, 20:].tolist() == expected[0]


def test_another_initial_bank_is_refused(tmp_path):
    ours = random_own(tmp_path / "ours")
    theirs = loaded(convert("lm2_jax", "huggingface", ours, tmp_path / "theirs"))
    theirs.model.start_memory.bank += 0.1
    theirs.save_pretrained(tmp_path / "changed")
    with pytest.raises(UserError, match=r"model\.start_memory\.bank: differs from the fixed initial bank"):
        convert("huggingface", "lm2_jax", tmp_path / "changed", tmp_path / "back")


def test_a_memory_without_code_in_torch_is_refused(tmp_path):
    ours = random_own(tmp_path / "ours", "memory.kind=ntm")
    with pytest.raises(
        UserError, match=r"memory\.kind ntm: our modelling code in PyTorch has no memory/head_add,.*; such a model"
    ):
        convert("lm2_jax", "huggingface", ours, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


# --- Warm start ----------------------------------------------------------------------------------------------------

WARM = ("memory.kind=lm2", "memory.num_slots=6", "memory.width=16", f"data.segment_length={T}", "data.batch_size=4")


def test_only_lm2_starts_as_a_llama(tmp_path):
    random_llama(tmp_path / "llama")
    with pytest.raises(UserError, match=r"cannot become memory\.kind rmt, whose memory_tokens would change"):
        convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "warm", "memory.kind=rmt")


def test_warm_start(tmp_path):
    """The Llama's logits to the bit of noise; E_mem is not zero; within 3 steps all of its memory has a gradient."""
    llama = random_llama(tmp_path / "llama", std=0.1)
    warm = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "warm", *WARM)
    model, params = lm2_jax.load(warm)
    assert model.spec.memory.kind == "lm2"
    tokens_BST = random_tokens((4, 4, T))
    memory = model.init_memory(4)
    logits_BSTV, _ = jax.jit(lambda p: run_segments(model, p, tokens_BST, memory))(params)
    expected = torch_logits(llama, tokens_BST.reshape(16, T)).reshape(4, 4, T, V)
    np.testing.assert_allclose(logits_BSTV, expected, atol=1e-5)

    attention = params["bank_blocks"]["memory"]
    assert not np.any(attention["read_output"])
    let_through = {**attention, "read_output": jnp.broadcast_to(jnp.eye(32), attention["read_output"].shape)}
    through = {**params, "bank_blocks": {**params["bank_blocks"], "memory": let_through}}
    read_BSTV, _ = jax.jit(lambda p: run_segments(model, p, tokens_BST, memory))(through)
    assert float(jnp.mean(jnp.abs(read_BSTV - logits_BSTV))) > 1e-2  # what the slots answer, and the zero holds back

    def loss(params):
        logits_BSTV, _ = run_segments(model, params, tokens_BST, memory)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits_BSTV[:, :, :-1], tokens_BST[:, :, 1:])
        return jnp.mean(nll)

    optimizer = optax.adam(1e-3)
    state, step = optimizer.init(params), jax.jit(jax.value_and_grad(loss))
    moved = set()
    for _ in range(3):
        _, gradients = step(params)
        moved |= {
            name for name, g in gradients["bank_blocks"]["memory"].items() if np.all(np.any(g, axis=range(1, g.ndim)))
        }
        updates, state = optimizer.update(gradients, state)
        params = optax.apply_updates(params, updates)
    assert moved == params["bank_blocks"]["memory"].keys()


def test_warm_start_trains(tmp_path):
    """`train.init_from` through the command's own loop: the first loss is the Llama's, and in 25 steps far below it."""
    llama = random_llama(tmp_path / "llama", std=0.1)
    warm = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "warm", *WARM)
    header = np.zeros(256, "<i4")
    tokens = np.tile(np.arange(40, dtype="<u4"), 300)
    header[:3] = 20240801, 7, len(tokens)
    (tmp_path / "train.bin").write_bytes(header.tobytes() + tokens.tobytes())
    config = load_run(warm).config.model_dump(mode="json")
    config["data"] |= {"path": [str(tmp_path / "train.bin")], "segments_per_window": 4, "validation_fraction": 0}
    config["train"] |= {"run_dir": str(tmp_path / "run"), "init_from": str(warm), "steps": 25}
    config["optim"] |= {"warmup_steps": 2, "learning_rate": 3e-3}
    config = parse_config(json.dumps(config))
    with quick_training():
        train(config)
        train_settings = config.train.model_copy(update={"run_dir": str(tmp_path / "other")})
        wider = config.memory.model_copy(update={"width": 24})
        with pytest.raises(UserError, match=r"train\.init_from: .* holds another model"):
            train(config.model_copy(update={"train": train_settings, "memory": wider}))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pieces = torch.tensor(tokens[: 29 * T].astype(np.int64).reshape(-1, T))  # every piece is like every other
    with torch.no_grad():
        logits_NTV = llama(pieces).logits
    before = torch.nn.functional.cross_entropy(logits_NTV[:, :-1].flatten(0, 1), pieces[:, 1:].flatten()).item()
    np.testing.assert_allclose(records[0]["nll"], before, rtol=0.02)
    assert records[-1]["nll"] < before - 1


# --- Tokenizers ----------------------------------------------------------------------------------------------------

TEXTS = (
    "John went to the kitchen. Where is John? kitchen.",
    "Mary's apple, there! Where is the milk?",
    "the  garden\nand the office",
)


def test_tokenizers_of_exported_directories(tmp_path):
    """AutoTokenizer gives our ids, begin first, and our text back."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.save(str(tmp_path / "bpe.json"))
    for kind, path in (("stories", None), ("bytes", None), ("tokenizers", str(tmp_path / "bpe.json"))):
        config = parse_config("", (f"tokenizer={{kind: {kind}, path: {path or 'null'}}}",))
        directory = tmp_path / kind
        directory.mkdir()
        write_tokenizer(config, None, directory)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", **special_ids(config, None)}))
        ours, theirs = load_tokenizer(config.tokenizer), transformers.AutoTokenizer.from_pretrained(directory)
        for text in TEXTS:
            ids = theirs(text, add_special_tokens=False).input_ids
            assert ids == ours.encode(text), (kind, text)
            if kind != "stories":  # whose spaces and capitals are not kept
                assert theirs.decode(ids) == text
        assert theirs.padding_side == "left"
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.special.bos_id, ours.special.eos_id)
        if ours.special.bos_id is not None:
            assert theirs(TEXTS[0]).input_ids == [ours.special.bos_id, *ours.encode(TEXTS[0])]


def test_length_that_tools_read(tmp_path):
    """lm_eval's `--batch_size auto` allocates 64 texts of it, and cuts longer ones: neither too long nor too short."""
    path = convert("lm2_jax", "huggingface", random_own(tmp_path / "ours"), tmp_path / "theirs")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert config.max_position_embeddings == 32_768


def test_exported_directory_has_its_tokenizer(tmp_path):
    """Also where the run read token shards, if its config names one."""
    ours = random_own(tmp_path / "ours", "tokenizer.kind=bytes", "model.vocab_size=258")
    theirs = convert("lm2_jax", "huggingface", ours, tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs, trust_remote_code=True)
    assert tokenizer("Ahab é").input_ids == [256, *"Ahab é".encode()]
    assert loaded(theirs).config.eos_token_id == tokenizer.eos_token_id == 257


def test_tokenizer_travels(tmp_path):
    """Of a Hugging Face directory into ours and out again; ours may be moved."""
    test_tokenizers_of_exported_directories(tmp_path)
    random_llama(tmp_path / "llama")
    shutil.copy(tmp_path / "bpe.json", tmp_path / "llama" / "tokenizer.json")
    (tmp_path / "llama" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours")
    (tmp_path / "ours").rename(tmp_path / "moved")
    config = load_run(tmp_path / "moved").config
    assert config.tokenizer == TokenizerConfig(kind="tokenizers", path=str(tmp_path / "moved" / "tokenizer.json"))
    convert("lm2_jax", "huggingface", tmp_path / "moved", tmp_path / "back")
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / d) for d in ("llama", "back"))
    assert after(TEXTS[0]).input_ids == before(TEXTS[0]).input_ids
