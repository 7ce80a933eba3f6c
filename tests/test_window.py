"""Attention over the edge of a segment: a window of tokens and sinks, equal to a dense mask over the whole document."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from window_reference import logits_of

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.decoding import sampling
from lm2_jax.decoding.memory_file import load_state, save_state
from lm2_jax.inspection.reading import read_text
from lm2_jax.model import build_model
from lm2_jax.segments import run_segments
from lm2_jax.training.step import memory_norms

T, S, V = 8, 4, 50
BASE = "{d_model: 32, d_ff: 48, num_layers: 2, num_heads: 4, num_kv_heads: 2, embedding_std: 0.5}"


def config_of(kind, *model, window=T, sinks=0, max_distance="null"):
    memory = f"memory={{kind: {kind}, num_slots: 5, num_heads: 2, num_layers: 1}}"
    sizes = (f"model={BASE}", f"model.vocab_size={V}", f"data.segment_length={T}", memory)
    window = (f"model.window={window}", f"model.sinks={sinks}", f"model.max_distance={max_distance}")
    return parse_config("", (*sizes, *window, *model))


@functools.cache
def make(kind, *model, **window):
    """Config, model and parameters; no gate or bias at its initial value."""
    config = config_of(kind, *model, **window)
    model = build_model(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.array(float("norm" in jax.tree_util.keystr(path)) + 0.25 * rng.normal(size=leaf.shape), jnp.float32)

    return config, model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())


@functools.cache
def program(model, schedule="auto", packed=True):
    def run(params, tokens, document, reset, memory):
        rest = {"reset_BS": reset, "document_BST": document} if packed else {}
        return run_segments(model, params, tokens, memory, schedule=schedule, **rest)

    return jax.jit(run)


# Documents of a lane: where each begins and ends. Alone; packed, with sinks that a segment's end splits; one to a
# segment, with padding; with padding and an empty segment inside a document; two to a segment
LANES = (
    [range(32)],
    [range(6), range(6, 23), range(23, 32)],
    [range(13), range(16, 27)],
    [[*range(5), *range(8, 16), *range(24, 32)]],
    [range(4), range(4, 8), range(8, 12), range(12, 32)],
)


def layout():
    """tokens, document ids and resets of LANES, [B,S,T] and [B,S]."""
    document, begins = np.zeros((len(LANES), S * T), np.int32), np.zeros((len(LANES), S * T), bool)
    for lane, documents in enumerate(LANES):
        for places in documents:
            begins[lane, places[0]] = True
            document[lane, [*places]] = 1
    begins, document = (x.reshape(len(LANES), S, T) for x in (begins, document))
    reset = begins[:, :, 0]
    document = document * (begins.cumsum(-1) + ~reset[..., None])
    tokens = np.random.default_rng(1).integers(0, V, document.shape).astype(np.int32)
    return tokens * (document > 0), document.astype(np.int32), reset


def assert_close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


WINDOWS = [
    *({"window": window, "sinks": sinks} for window in (T, 5) for sinks in (0, 1, 4)),
    {"window": T, "sinks": 4, "max_distance": 9},  # cut for some sinks of a query, for others not
    {"window": 5, "sinks": 2, "max_distance": 4},  # every sink beyond the window
    {"window": 3, "sinks": 2},  # two documents of a segment have sinks beyond the window
]


@pytest.mark.parametrize("schedule", ["layer", "segment"])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("kind", ["lm2", "none"])
def test_segments_are_the_whole_document(kind, window, schedule):
    check_documents(*make(kind, **window), schedule)


def check_documents(config, model, params, schedule):
    """The logits of every document in LANES are those of the reference."""
    tokens, document, reset = layout()
    run = program(model, schedule)
    logits, _ = run(params, tokens, document, reset, model.init_memory(len(LANES), params))
    logits = np.asarray(logits).reshape(len(LANES), S * T, V)
    for lane, documents in enumerate(LANES):
        for places in map(list, documents):
            cuts = [sum(place < end for place in places) for end in range(T, S * T, T)]
            text = tokens[lane].ravel()[places]
            assert_close(logits[lane, places], logits_of(config, params, text, cuts))


@pytest.mark.parametrize("schedule", ["layer", "segment"])
@pytest.mark.parametrize(("kind", "bank"), [("lm2", ("memory.write=top_k", "memory.write_slots=2")), ("ntm", ())])
def test_other_banks_beside_a_window(kind, bank, schedule):
    """Routed writes and Turing machines, each against its equations."""
    check_documents(*make(kind, *bank, window=5), schedule)


@pytest.mark.parametrize(("remat", "schedule"), [("block", "layer"), ("full", "layer"), ("none", "segment")])
def test_recomputing_and_schedules_change_nothing(remat, schedule):
    """Outputs, and gradients, which pass the edges of a window's segments."""
    rest = {"window": 5, "sinks": 4, "max_distance": 9}
    _, model, params = make("lm2", **rest)
    _, other, _ = make("lm2", f"train.remat={remat}", **rest)
    tokens, document, reset = layout()

    def loss(params, model, schedule):
        run, memory = program(model, schedule), model.init_memory(len(LANES), params)
        logits, memory = run(params, tokens, document, reset, memory)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3]), memory

    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 2))
    jax.tree.map(assert_close, differentiate(params, model, "layer"), differentiate(params, other, schedule))


@pytest.mark.parametrize("kind", ["lm2", "none"])
def test_windows_and_segments_carry_on(kind):
    """A scan is a loop over single segments; a second window goes on; without document ids it is the same."""
    _, model, params = make(kind, window=5, sinks=4)
    tokens = np.random.default_rng(2).integers(0, V, (2, S, T)).astype(np.int32)
    expected, after = program(model, packed=False)(params, tokens, None, None, model.init_memory(2, params))
    step = jax.jit(lambda *arguments: model.apply({"params": params}, *arguments))
    memory = model.init_memory(2, params)
    for s in range(S):
        logits, memory = step(tokens[:, s], memory)
        assert_close(logits, expected[:, s])
    jax.tree.map(assert_close, memory, after)

    one, zero = np.ones((2, 2, T), np.int32), np.zeros((2, 2), bool)
    first, memory = program(model)(params, tokens[:, :2], one, zero, model.init_memory(2, params))
    second, memory = program(model)(params, tokens[:, 2:], one, zero, memory)
    assert_close(np.concatenate([first, second], axis=1), expected)
    jax.tree.map(assert_close, memory, after)


@pytest.mark.parametrize("kind", ["lm2", "none"])
def test_a_reset_lane_is_a_fresh_lane(kind):
    _, model, params = make(kind, window=5, sinks=4)
    tokens, document, reset = layout()
    fresh, run = model.init_memory(len(LANES), params), program(model)
    _, used = run(params, tokens, document, reset, fresh)
    reset[:, 0] = np.array([True, False, True, False, True])
    after_used, after_fresh = (run(params, tokens, document, reset, memory) for memory in (used, fresh))
    np.testing.assert_array_equal(after_used[0][::2], after_fresh[0][::2])
    assert np.abs(after_used[0][1::2] - after_fresh[0][1::2])[:, 0].max() > 0.1
    for a, b in zip(*map(jax.tree.leaves, (after_used[1], after_fresh[1])), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, ::2], np.asarray(b)[:, ::2])


@pytest.mark.parametrize(("sinks", "end"), [(0, 12 + 2 * 4 + 1), (2, S * T)])
def test_no_token_hears_a_later_one(sinks, end):
    """Token 12 is heard from there on, over the edge, and as far as two layers reach; a sink, to the end."""
    _, model, params = make("none", window=5, sinks=sinks)
    tokens = np.random.default_rng(3).integers(0, V, (1, S * T)).astype(np.int32)
    place = 0 if sinks else 12
    changed = tokens.copy()
    changed[0, place] = (tokens[0, place] + 1) % V
    run, memory = program(model, packed=False), model.init_memory(1)
    logits = [np.asarray(run(params, x.reshape(1, S, T), None, None, memory)[0]) for x in (tokens, changed)]
    apart = np.abs(logits[0] - logits[1]).reshape(S * T, V).max(-1)
    assert apart[:place].max(initial=0) == 0 and apart[end:].max(initial=0) == 0
    assert apart[place:end].min() > 1e-3


def test_no_angle_grows_with_the_document():
    """After a thousand tokens or a hundred million, the same text gives the same logits, to the bit."""
    _, model, params = make("none", window=5, sinks=2, max_distance=9)
    tokens = np.random.default_rng(4).integers(0, V, (2, 1, S, T)).astype(np.int32)
    run = program(model, packed=False)
    _, memory = run(params, tokens[0], None, None, model.init_memory(1))
    logits = []
    for length in (1000, 10**8):
        memory.edges["blocks"] = memory.edges["blocks"].replace(length_B=jnp.full((2, 1), length, jnp.int32))
        logits.append(run(params, tokens[1], None, None, memory)[0])
    np.testing.assert_array_equal(*logits)


def test_the_memory_is_looked_into_without_the_edges():
    _, model, params = make("lm2", sinks=2)
    trace = read_text(model, params, np.arange(20))
    assert trace.slots_LNM.shape == (1, 5, 32) and trace.read_LKN.shape == (1, 20, 5)
    norms = memory_norms(model, model.init_memory(3))
    assert norms == memory_norms(model, model.kind.init_memory(3, None))


# --- Decoding and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "window"),
    [("lm2", {"window": 5, "sinks": 4, "max_distance": 9}), ("none", {"window": T, "sinks": 2}), ("none", {})],
)
def test_token_by_token_is_all_at_once(kind, window, tmp_path):
    """Rows with clocks of their own; in the middle the state is saved and loaded."""
    config, model, params = make(kind, **window)
    prompts, more = (3, 8, 14), 14
    rows = [np.random.default_rng(n).integers(0, V, n + more) for n in prompts]
    expected = [logits_of(config, params, row, [*range(T, len(row), T)]) for row in rows]
    state = sampling.start(model, params, len(rows))
    logits, state = sampling.read(model, params, [r[:n] for r, n in zip(rows, prompts, strict=True)], state)
    for step in range(more):
        for row, n in enumerate(prompts):
            assert_close(logits[row], expected[row][n + step - 1])
        if step == 7:
            save_state(tmp_path / "m.safetensors", model, params, state)
            loaded = load_state(tmp_path / "m.safetensors", model, params)
            assert jax.tree.structure(loaded) == jax.tree.structure(state)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), loaded, state)
            state = loaded
        tokens = np.array([[row[n + step]] for row, n in zip(rows, prompts, strict=True)])
        logits, state = sampling.advance(model, params, tokens, np.ones(len(rows)), state)


def test_memory_files_are_read_strictly(tmp_path):
    """A count of tokens that is not the document's, or a window of another size, would be another text."""
    _, model, params = make("none", sinks=2)
    _, state = sampling.read(model, params, [[*range(11)]], sampling.start(model, params, 1))
    save_state(tmp_path / "m.safetensors", model, params, state)
    _, other, _ = make("none", sinks=1)
    with pytest.raises(UserError, match=r"model\.sinks: 2 in the file, 1 in the model"):
        load_state(tmp_path / "m.safetensors", other, params)

    with safetensors.safe_open(tmp_path / "m.safetensors", "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = "memory.edges.blocks.length_B"
    assert tensors[name].ravel().tolist() == [8, 8]
    tensors[name] = tensors[name] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(UserError, match=r"length_B: found \[\[9\], \[9\]\]; should be \[8\] in every layer"):
        load_state(tmp_path / "m.safetensors", model, params)


# --- Settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.sinks=4",), "model.sinks 4 needs model.window"),
        (("model.window=1",), "found 1; should be greater than or equal to 2"),
        (("model.max_distance=9",), "model.max_distance 9 needs model.window"),
        (("model.window=33",), "model.window 33 is above the segment length 32; it reaches one segment back at most"),
        (
            ("model.window=32", "train.curriculum=[{segments: 1, segment_length: 16, steps: 9}, "
             "{segments: 1, segment_length: 32}]"),
            "model.window 32 is above the segment length 16; it reaches one segment back at most",
        ),
        (("model.window=8", "model.sinks=8"), "model.sinks 8 must be below model.window 8"),
        (
            ("model.window=8", "model.max_distance=6"),
            "model.max_distance 6 is below 7, the farthest in model.window",
        ),
        (
            ("model.window=8", "memory={kind: rmt}"),
            "model.window 8: memory.kind rmt attends to one segment alone; use another, or null",
        ),
        (
            ("model={window: 8, d_model: 32}", "memory={kind: official, num_slots: 32}"),
            "model.window 8: memory.kind official attends to one segment alone; use another, or null",
        ),
    ],
)  # fmt: skip
def test_windows_that_cannot_be(overrides, said):
    with pytest.raises(UserError) as error:
        parse_config("", overrides, where="my.yaml")
    (line,) = str(error.value).splitlines()
    assert line.endswith(f": {said}") and "model." in line


@pytest.mark.parametrize("kind", ["lm2", "none"])
def test_without_a_window_nothing_is_carried(kind):
    """Segments are read by themselves, and the memory is the kind's own."""
    config = config_of(kind, window="null")
    model = build_model(config)
    memory = model.init_memory(2)
    assert jax.tree.structure(memory) == jax.tree.structure(model.kind.init_memory(2, None))
    assert model.lane_axis == model.kind.lane_axis
    _, windowed, _ = make(kind)
    assert jax.tree.map(jnp.shape, windowed.abstract_params()) == jax.tree.map(jnp.shape, model.abstract_params())
