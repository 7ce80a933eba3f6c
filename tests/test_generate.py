"""Generation is the teacher-forced forward, one token at a time: whatever the kind, the batch, or a stop in between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import tiny_config

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.decoding import sampling
from lm2_jax.decoding.memory_file import load_state, save_state
from lm2_jax.decoding.sampling import generate
from lm2_jax.decoding.text_stream import TextStream
from lm2_jax.model import build_model
from lm2_jax.model.decode import append_tokens, finish_segment
from lm2_jax.model.decoder import Decoder
from lm2_jax.segments import run_segments
from lm2_jax.tokenizer import BytesTokenizer

T, V = 8, 50
CAUSAL = ("lm2", "rmt", "armt", "delta", "ntm", "none")


@functools.cache
def make(*overrides, kind="lm2", seed=0):
    base = ("model={d_model: 32, d_ff: 48, num_layers: 2, num_heads: 4, num_kv_heads: 2, conv_width: 4}",)
    sizes = (f"model.vocab_size={V}", f"data.segment_length={T}", "memory={num_slots: 5, num_heads: 2}")
    model = build_model(parse_config("", (*base, *sizes, f"memory.kind={kind}", *overrides)))
    init = functools.partial(model.init, tokens_BT=jnp.zeros((1, T), jnp.int32), memory=model.init_memory(1))
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.array(float("norm" in jax.tree_util.keystr(path)) + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)  # of no gate or bias at its initial value


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, length).tolist() for length in lengths]


@functools.cache
def _forward(model):
    return jax.jit(lambda params, tokens_BST, memory: run_segments(model, params, tokens_BST, memory)[0])


def teacher_forced(model, params, rows, segments=6):
    """Logits [B, segments * T, V] of whole texts, padded at their ends."""
    tokens = np.array([row + [0] * (segments * T - len(row)) for row in rows])
    memory = model.init_memory(len(rows), params)
    logits_BSTV = _forward(model)(params, tokens.reshape(len(rows), segments, T), memory)
    return np.asarray(logits_BSTV).reshape(len(rows), -1, V)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# --- One token at a time is all at once ----------------------------------------------------------------------------

OTHER_SIZES = ("model.conv_width=0", "memory.width=24", "memory.num_layers=1", "memory.gates=independent")
ROUTED = ("memory.write=top_k", "memory.write_slots=1")
MIDDLE = ("model.num_layers=4", "memory.first_layer=1", "memory.num_layers=2", "model.lora.targets=[mlp, embedding]")
VARIANTS = [*((kind, ()) for kind in CAUSAL), ("lm2", OTHER_SIZES), ("lm2", MIDDLE), ("lm2", ROUTED)]
VARIANTS += [(kind, OTHER_SIZES[:1]) for kind in ("rmt", "none")]


@pytest.mark.parametrize(("kind", "overrides"), VARIANTS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_pieces_are_the_whole(kind, overrides):
    """Rows cut into pieces of any size, each by its own clock over several segment ends, give every logit."""
    model, params = make(*overrides, kind=kind)
    rows, rng = texts(45, 30, 37), np.random.default_rng(1)
    expected = teacher_forced(model, params, rows)
    state, read, most = sampling.start(model, params, len(rows)), np.zeros(len(rows), int), 5
    finish = jax.jit(lambda *arguments: model.apply({"params": params}, *arguments, method=finish_segment))

    @jax.jit
    def extend(*arguments):
        hidden_BQD, state = model.apply({"params": params}, *arguments, method=append_tokens)
        return model.apply({"params": params}, hidden_BQD, method=Decoder.project), state

    while any(read < [len(row) for row in rows]):
        full_B = np.asarray(state.count_B) == T
        if full_B.any():
            state = finish(full_B, state)
        room_B = T - np.asarray(state.count_B)
        count_B = np.array([min(rng.integers(0, most + 1), len(r) - n) for r, n in zip(rows, read, strict=True)])
        count_B = np.minimum(count_B, room_B)
        pieces = [r[n : n + c] + [7] * (most - c) for r, n, c in zip(rows, read, count_B, strict=True)]
        logits_BQV, state = extend(np.array(pieces), count_B, state)
        for row, (n, c) in enumerate(zip(read, count_B, strict=True)):
            assert_close(np.asarray(logits_BQV)[row, :c], expected[row, n : n + c])
        read += count_B
    np.testing.assert_array_equal(state.read_B, read)


@pytest.mark.parametrize("kind", CAUSAL)
def test_prompts_then_tokens(kind):
    """Unequal prompts stream in, then every row passes three segment ends token by token."""
    model, params = make(kind=kind)
    prompts, lengths = (3, 8, 21), np.array((3, 8, 21)) + 25
    rows = texts(*lengths)
    expected = teacher_forced(model, params, rows)
    start = sampling.start(model, params, len(rows))
    logits, state = sampling.read(model, params, [row[:n] for row, n in zip(rows, prompts, strict=True)], start)
    for step in range(25):
        for row, n in enumerate(prompts):
            assert_close(logits[row], expected[row, n + step - 1])
        tokens_B1 = np.array([[row[n + step]] for row, n in zip(rows, prompts, strict=True)])
        logits, state = sampling.advance(model, params, tokens_B1, np.ones(len(rows)), state)
    np.testing.assert_array_equal(state.read_B, lengths)


@pytest.mark.parametrize("kind", CAUSAL)
def test_what_memory_holds_is_heard(kind):
    """Without its memory a continuation is another one, so the equalities above say something about memory."""
    model, params = make(kind=kind)
    (text,) = texts(20)
    with_memory, _ = sampling.read(model, params, [text], sampling.start(model, params, 1))
    last_segment_only, _ = sampling.read(model, params, [text[16:]], sampling.start(model, params, 1))
    moved = float(jnp.max(jnp.abs(with_memory - last_segment_only)))
    assert moved < 1e-4 if kind == "none" else moved > 1e-2


def test_the_bank_is_projected_once_a_segment():
    """Tokens read keys and values that were made at the segment's start; the next segment makes its own."""
    model, params = make()
    _, state = sampling.read(model, params, texts(3), sampling.start(model, params, 1))
    memory = params["bank_blocks"]["memory"]
    changed = {
        **params,
        "bank_blocks": {**params["bank_blocks"], "memory": {**memory, "read_key": memory["read_key"] * 9}},
    }
    for count, same in ((T - 3, True), (T - 2, False)):
        logits, others = (sampling.read(model, p, texts(count, seed=1), state)[0] for p in (params, changed))
        assert (np.max(np.abs(logits - others)) == 0) == same


def test_state_does_not_grow():
    model, params = make()
    short, long = (sampling.read(model, params, texts(n), sampling.start(model, params, 1))[1] for n in (3, 43))
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)


# --- Tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy(kind):
    """The most likely token each time; a row of a batch is the row alone."""
    model, params = make(kind=kind)
    prompts = texts(2, 17, 8)
    together = generate(model, params, prompts, max_new_tokens=20)
    logits = teacher_forced(model, params, [p + t for p, t in zip(prompts, together, strict=True)])
    for row, prompt in enumerate(prompts):
        places = slice(len(prompt) - 1, len(prompt) + 19)
        assert together[row] == np.argmax(logits[row, places], axis=-1).tolist()
        assert generate(model, params, [prompt], max_new_tokens=20) == [together[row]]
    assert len({tuple(row) for row in together}) == 3


def test_sampling():
    model, params = make()
    prompts = texts(4, 11, 6)
    draw = functools.partial(generate, model, params, max_new_tokens=15, temperature=1.5)
    drawn = draw(prompts, seed=3)
    assert drawn == draw(prompts, seed=3)
    assert drawn != draw(prompts, seed=9)
    greedy = generate(model, params, prompts, max_new_tokens=15)
    assert drawn != greedy
    assert greedy == draw(prompts, top_k=1) == draw(prompts, top_p=1e-6)
    for row, prompt in enumerate(prompts):
        assert draw([prompt], seed=3 + row) == [drawn[row]]
        assert draw([*prompts[:2], prompt], seed=1 + row)[2] == drawn[row]


@pytest.mark.parametrize("varied", ["seed", "index"])
def test_draws_have_the_shares_asked_for(varied):
    logits, count = np.log([0.1, 0.4, 0.2, 0.3]), 4000
    one, many = np.full(count, 7, np.uint32), np.arange(count, dtype=np.uint32)
    seed_B, index_B = (many, one) if varied == "seed" else (one, many)

    def shares(temperature=1.0, top_k=np.inf, top_p=np.inf):
        drawn = sampling.draw(np.tile(logits, (count, 1)), seed_B, index_B, temperature, top_k, top_p)
        return np.bincount(drawn, minlength=4) / count

    np.testing.assert_allclose(shares(), [0.1, 0.4, 0.2, 0.3], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.65), [0, 4 / 7, 0, 3 / 7], atol=0.03)
    np.testing.assert_allclose(shares(0.5), np.array([0.01, 0.16, 0.04, 0.09]) / 0.3, atol=0.03)


def test_rows_stop_on_their_own():
    model, params = make()
    prompts = texts(4, 11, 6)
    first, second, third = generate(model, params, prompts, max_new_tokens=12)
    stop = next(token for token in first if token not in second + third)
    stopped = generate(model, params, prompts, max_new_tokens=12, stop_ids=[stop])
    assert stopped == [first[: first.index(stop)], second, third]

    seen = []

    def enough(row, token):
        seen.append((row, token))
        return row == 1 and len([r for r, _ in seen if r == 1]) == 3

    assert generate(model, params, prompts, max_new_tokens=12, on_token=enough) == [first, second[:3], third]
    assert [token for row, token in seen if row == 0] == first
    assert generate(model, params, prompts, max_new_tokens=0) == [[], [], []]


# --- Memory files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in CAUSAL), ("lm2", "bfloat16")])
@pytest.mark.parametrize("length", [5, 16, 21])
def test_saved_memory_goes_on(tmp_path, kind, dtype, length):
    """Stopped inside a segment or at its end, saved, loaded: drawn to the token as if it had never stopped."""
    model, params = make(f"train.dtype={dtype}", kind=kind)
    (text,) = texts(length)
    options = {"temperature": 1.0, "seed": 5}
    before, state = sampling.decode(model, params, [text], sampling.start(model, params, 1), max_new_tokens=6)
    save_state(tmp_path / "m.safetensors", model, params, state)
    loaded = load_state(tmp_path / "m.safetensors", model, params)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    names = safetensors.numpy.load_file(tmp_path / "m.safetensors").keys()
    assert not [name for name in names if "memory_cache" in name or name.startswith("caches")]
    (question,) = texts(9, seed=2)
    after = generate(model, params, [question], state=loaded, max_new_tokens=14, **options)
    assert after == generate(model, params, [question], state=state, max_new_tokens=14, **options)
    assert after == generate(model, params, [text + before[0] + question], max_new_tokens=14, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def _edited(path, change):
    """The file with its tensors and metadata changed."""
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, m: t.pop("past.bank_blocks.tail_BWD"), "past.bank_blocks.tail_BWD: is missing"),
        (lambda t, m: t.update(extra=np.zeros(1)), "extra: unknown"),
        (
            lambda t, m: t.update(memory=t["memory"][:1]),
            "memory: found float32 [1, 1, 5, 32]; should be float32 [2, 1,",
        ),
        (lambda t, m: t.update(count_B=t["count_B"] + 9), "count_B: found [14]; should be within 0 and 8"),
        (lambda t, m: t.update(count_B=t["count_B"].astype(float)), "count_B: found float32 [1]; should be int32 [1]"),
        (lambda t, m: m.clear(), "not a memory file of lm2_jax (metadata lm2_jax.memory is missing)"),
        (lambda t, m: m.update({"lm2_jax.memory": "[]"}), "cannot be read as a memory file"),
    ],
)
def test_memory_files_are_read_strictly(tmp_path, change, said):
    model, params = make()
    path = tmp_path / "m.safetensors"
    save_state(path, model, params, sampling.read(model, params, texts(5), sampling.start(model, params, 1))[1])
    _edited(path, change)
    with pytest.raises(UserError) as error:
        load_state(path, model, params)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value)


def test_memory_of_another_model(tmp_path):
    model, params = make()
    path = tmp_path / "m.safetensors"
    save_state(path, model, params, sampling.start(model, params, 1))
    with pytest.raises(UserError, match=r"m\.safetensors: memory of another model:\n  memory\.kind: 'lm2' in the file"):
        load_state(path, *make(kind="rmt"))
    with pytest.raises(UserError, match="the same sizes, but other parameters"):
        load_state(path, *make(seed=1))
    for content, said in ((None, "No such file"), (b"", "header too small"), (b"no tensors here", "header too large")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"m.safetensors: cannot be read as a memory file .*{said}"):
            load_state(path, model, params)
    with pytest.raises(UserError, match=r"no/m\.safetensors: cannot be written \(No such file or directory\)"):
        save_state(tmp_path / "no" / "m.safetensors", model, params, sampling.start(model, params, 1))


# --- Text ----------------------------------------------------------------------------------------------------------


def stream(text, *stops):
    """What is written after each byte of `text`, and whether a stop string ended it."""
    pieces, stopped = [], False
    out = TextStream(BytesTokenizer(), stops, pieces.append)
    for byte in text:
        stopped = out.push(byte)
        pieces.append("|")
        if stopped:
            break
    out.close()
    return "".join(pieces), stopped


def test_text_comes_as_soon_as_it_is_sure():
    assert stream("aé€.".encode()) == ("a||é|||€|.|", False)
    assert stream(b"a\xffb\xe2\x82") == ("a||\ufffdb|||\ufffd", False)  # bytes that are no text come with what follows
    assert stream(b"one\n\ntwo", "\n\n", "zzz") == ("o|n|e|||", True)
    assert stream(b"one\ntwo\n", "\n\n") == ("o|n|e||\nt|w|o||\n", False)
    assert stream(b"abcabd", "abd", "bca") == ("||a||", True)


# --- Mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: found -1; give 0"),
        ({"temperature": -0.5}, "temperature: found -0.5; give 0"),
        ({"temperature": float("nan")}, "temperature: found nan; give 0"),
        ({"top_k": 0}, "top_k: found 0; give 1 or more"),
        ({"top_p": 1.5}, "top_p: found 1.5; give a probability"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 50]]}, "prompt 0 holds token id 50, but the model has ids below 50"),
    ],
)
def test_options(options, said):
    with pytest.raises(UserError, match=said):
        generate(*make(), **{"prompts": [[1]], "max_new_tokens": 1, **options})


def test_official_refuses():
    sizes = ("model.vocab_size=9", "memory.num_slots=16", "data.segment_length=16", "train.curriculum=[]")
    model = build_model(tiny_config("run", "memory.kind=official", *sizes))
    with pytest.raises(UserError, match=r"memory\.kind official: cannot generate; its tokens look ahead"):
        generate(model, None, [[1]], max_new_tokens=1)
