"""The invariants of the model: causality, the two schedules, resets, padding, packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

from lm2_jax.config import parse_config
from lm2_jax.model import build_model
from lm2_jax.model.layers import CausalConv, Layout, rope_frequencies
from lm2_jax.model.memory.lm2 import initial_bank
from lm2_jax.segments import run_segments

B, S, T, V = 3, 4, 8, 50
KINDS = ("lm2", "rmt", "armt", "delta", "ntm", "none")
LAYERED = tuple(kind for kind in KINDS if kind != "rmt")  # also run layer by layer, and packed


@functools.cache
def make(*overrides, kind="lm2", seed=0):
    base = ("model.d_model=32", "model.d_ff=48", "model.num_layers=2", "model.num_kv_heads=2", "model.conv_width=4")
    config = parse_config("", (f"model.vocab_size={V}", f"memory.kind={kind}", "memory.num_slots=5", *base, *overrides))
    model = build_model(config)
    return model, random_params(model, 0.1, seed)


@functools.cache
def compiled_apply(model):
    return jax.jit(lambda params, args, kwargs: model.apply({"params": params}, *args, **kwargs))


@functools.cache
def compiled_segments(model, schedule):
    return jax.jit(lambda params, args, kwargs: run_segments(model, params, *args, schedule=schedule, **kwargs))


def apply(model, params, *args, **kwargs):
    return compiled_apply(model)(params, args, kwargs)


def segments(model, params, *args, schedule="auto", **kwargs):
    return compiled_segments(model, schedule)(params, args, kwargs)


def tokens(shape=(B, S, T), seed=0):
    return jnp.array(np.random.default_rng(seed).integers(0, V, shape), jnp.int32)


def ragged_layout(packed, seed=1):
    """Documents in the order the lanes make them: ids grow, padding at the end, an empty segment, some resets."""
    rng = np.random.default_rng(seed)
    document_BST = np.ones((B, S, T), np.int32)
    if packed:
        document_BST = np.sort(rng.integers(1, 4, (B, S, T)), axis=-1)
        document_BST = document_BST - document_BST[..., :1] + 1
    document_BST[0, 1, 5:] = 0
    document_BST[1, 2] = 0
    reset_BS = rng.random((B, S)) < 0.4
    return jnp.array(document_BST), jnp.array(reset_BS)


def random_memory(model, params, seed=3):
    """What some text left."""
    return segments(model, params, tokens(seed=seed), model.init_memory(B, params))[1]


def relative_difference(a, b):
    differences = [
        float(jnp.max(jnp.abs(x - y)) / (jnp.max(jnp.abs(x)) + 1e-6))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return max(differences, default=0)


def assert_same(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert relative_difference(a, b) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_dtypes(kind):
    model, params = make("train.dtype=bfloat16", kind=kind)
    memory = model.init_memory(B, params)
    logits, after = apply(model, params, tokens()[:, 0], memory)
    assert logits.shape == (B, T, V)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, memory)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((after, params)))


def test_bank_has_the_sizes_asked_for():
    model, params = make("memory.num_slots=7", "memory.width=24", "memory.num_layers=1")
    assert model.init_memory(B, params).shape == (1, B, 7, 24)
    assert params["blocks"]["attention"]["query"].shape[0] == 1


def test_initial_bank():
    bank = initial_bank(6, 4)
    np.testing.assert_array_equal(bank[:4], np.eye(4))
    np.testing.assert_allclose(jnp.linalg.norm(bank, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(bank, initial_bank(6, 4))
    np.testing.assert_array_equal(initial_bank(3, 4), np.eye(4)[:3])


@pytest.mark.parametrize(
    ("kind", "schedule"), [*((kind, "segment") for kind in KINDS), *((kind, "layer") for kind in LAYERED)]
)
def test_causal(kind, schedule):
    """Changing token t moves no logit before t, nor any memory written before its segment's end."""
    model, params = make(kind=kind)
    before = tokens()
    memory = random_memory(model, params)
    run = jax.jit(lambda t: run_segments(model, params, t, memory, schedule=schedule))
    logits, after = run(before)
    for s, t in ((0, 0), (1, 3), (2, T - 1), (S - 1, T - 1)):
        changed = before.at[:, s, t].add(1)
        logits_2, after_2 = run(changed % V)
        flat, flat_2 = logits.reshape(B, S * T, V), logits_2.reshape(B, S * T, V)
        place = s * T + t
        np.testing.assert_array_equal(flat[:, :place], flat_2[:, :place])
        assert float(jnp.max(jnp.abs(flat[:, place:] - flat_2[:, place:]))) > 1e-3
        if kind != "none":
            assert relative_difference(after, after_2) > 1e-4
            if place + 1 < S * T and s + 1 < S:  # and the next segment learns of it only through memory
                assert float(jnp.max(jnp.abs(flat[:, (s + 1) * T :] - flat_2[:, (s + 1) * T :]))) > 1e-4


def test_no_gradient_from_earlier_positions_to_later_tokens():
    """Attention, convolution, read and output gate of position t have no derivative by any token after t."""
    model, params = make("model.num_layers=1")
    memory = random_memory(model, params)
    bigger = make("model.num_layers=1", f"model.vocab_size={V + T}")[0]  # an embedding row of its own per position

    def logits(table_TD):
        embedded = {**params, "embedding": jnp.concatenate([params["embedding"], table_TD])}
        logits_BTV, _ = bigger.apply({"params": embedded}, jnp.tile(jnp.arange(V, V + T), (B, 1)), memory)
        return logits_BTV[0, :, :3]

    jacobian_TVTD = jax.jit(jax.jacrev(logits))(0.5 * jax.random.normal(jax.random.key(5), (T, 32)))
    strength_TT = jnp.max(jnp.abs(jacobian_TVTD), axis=(1, 3))
    np.testing.assert_array_equal(strength_TT, jnp.tril(strength_TT))
    assert float(jnp.min(jnp.diagonal(strength_TT))) > 0


OTHER_SIZES = ("memory.width=24", "memory.num_layers=1", "memory.gates=independent")
ROUTED = ("memory.write=top_k", "memory.write_slots=1")
MIDDLE = ("memory.width=24", "model.num_layers=3", "memory.first_layer=1", "memory.num_layers=1")


@pytest.mark.parametrize(
    ("kind", "remat", "packed", "overrides"),
    [
        ("lm2", "none", True, OTHER_SIZES),
        ("lm2", "block", True, ("train.unroll=2",)),
        ("lm2", "full", False, ()),
        ("lm2", "offload", True, ()),
        ("armt", "none", True, MIDDLE),
        ("armt", "full", False, ()),
        ("delta", "none", True, MIDDLE),
        ("ntm", "none", True, MIDDLE),
        ("lm2", "none", True, ROUTED),
    ],
)
def test_schedules_agree(kind, remat, packed, overrides):
    """Logits, banks and all gradients, with resets, padding and packing."""
    model, params = make(f"train.remat={remat}", *overrides, kind=kind)
    document_BST, reset_BS = ragged_layout(packed)
    memory, batch = random_memory(model, params), tokens()

    def run(schedule):
        def objective(params, memory):
            logits, after = segments(
                model, params, batch, memory, reset_BS=reset_BS, document_BST=document_BST, schedule=schedule
            )
            weights = (document_BST > 0)[..., None]
            carried = sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(after))
            return jnp.sum(jnp.sin(logits) * weights) + carried, (logits, after)

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(params, memory)

    assert_same(run("segment"), run("layer"))


@pytest.mark.parametrize("kind", KINDS)
def test_scan_is_the_loop(kind):
    """run_segments is one model.apply after the other, with its loops unrolled or not."""
    (model, params), (unrolled, _) = make(kind=kind), make("train.unroll=2", kind=kind)
    document_BST, reset_BS = ragged_layout(packed=kind in LAYERED)
    start, batch = random_memory(model, params), tokens()
    memory, logits = start, []
    for s in range(S):
        logits_BTV, memory = apply(
            model, params, batch[:, s], memory, document_BT=document_BST[:, s], reset_B=reset_BS[:, s]
        )
        logits.append(logits_BTV)
    expected = jnp.stack(logits, axis=1), memory
    for program in (model, unrolled):
        assert_same(segments(program, params, batch, start, reset_BS=reset_BS, document_BST=document_BST), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_chain(kind):
    """One window of S segments is two windows, the memory handed on."""
    model, params = make(kind=kind)
    start, batch = random_memory(model, params), tokens()
    whole = segments(model, params, batch, start)
    first, memory = segments(model, params, batch[:, :1], start)
    second, memory = segments(model, params, batch[:, 1:], memory)
    assert_same(whole, (jnp.concatenate([first, second], axis=1), memory))


@pytest.mark.parametrize("kind", KINDS)
def test_reset_lane_is_a_fresh_lane(kind):
    """A reset lane forgets everything; its neighbours go on."""
    model, params = make(kind=kind)
    batch, memory = tokens()[:, 0], random_memory(model, params)
    reset_B = jnp.array([False, True, False])
    got = apply(model, params, batch, memory, reset_B=reset_B)
    fresh = apply(model, params, batch, model.init_memory(B, params))
    carried = apply(model, params, batch, memory)
    expected = jnp.where(reset_B[:, None, None], fresh[0], carried[0])
    assert_same((got[0], got[1]), (expected, model.kind.select_lanes(reset_B, fresh[1], carried[1])))
    if kind != "none":
        assert relative_difference(fresh[0], carried[0]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """Tokens under padding neither write nor are seen; a segment of padding leaves the memory as it is."""
    model, params = make(kind=kind)
    memory, batch = random_memory(model, params), tokens()[:, 0]
    document_BT = jnp.ones((B, T), jnp.int32).at[:, 5:].set(0).at[2].set(0)

    def run(batch):
        return apply(model, params, batch, memory, document_BT=document_BT)

    logits, after = run(batch)
    logits_2, after_2 = run(batch.at[:, 5:].set(7))
    np.testing.assert_array_equal(logits[:2, :5], logits_2[:2, :5])
    jax.tree.map(np.testing.assert_array_equal, after, after_2)
    assert bool(jnp.all(jnp.isfinite(logits)))
    lane_2 = [jnp.moveaxis(x, model.kind.lane_axis, 0)[2] for x in jax.tree.leaves((memory, after))]
    for old, new in zip(lane_2[: len(lane_2) // 2], lane_2[len(lane_2) // 2 :], strict=True):
        np.testing.assert_array_equal(old, new)
    short = apply(model, params, batch[:2, :5], jax.tree.map(lambda x: _lanes(model, x, 2), memory))
    assert_same((logits[:2, :5], jax.tree.map(lambda x: _lanes(model, x, 2), after)), short)


def _lanes(model, x, count):
    return jnp.moveaxis(jnp.moveaxis(x, model.kind.lane_axis, 0)[:count], 0, model.kind.lane_axis)


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.parametrize("schedule", ["segment", "layer"])
def test_packed_is_alone(kind, schedule):
    """A document gives the same logits, and leaves the same bank, among others as alone at the same cut points."""
    model, params = make(kind=kind)
    # Lane: document a (11 tokens), b (3), c (12), cut into segments of 8: a a a a a a a a | a a a b b b c c | c ...
    lengths, total = (11, 3, 12), 32
    starts = np.cumsum((0, *lengths))
    text = np.zeros(total, np.int32)
    text[: starts[-1]] = np.random.default_rng(0).integers(0, V, starts[-1])

    def lay_out(documents):
        owner = np.zeros(total, int)
        for number, (start, length) in enumerate(zip(starts, lengths, strict=False), 1):
            if number in documents:
                owner[start : start + length] = number
        owner_ST = owner.reshape(-1, T)
        document_ST = np.zeros_like(owner_ST)
        for row, names in zip(document_ST, owner_ST, strict=True):
            for count, name in enumerate(dict.fromkeys(names[names > 0]), 1):
                row[names == name] = count
        firsts = [names[names > 0][:1] for names in owner_ST]
        reset_S = [bool(n.size) and int(starts[n[0] - 1]) // T == s for s, n in enumerate(firsts)]
        return jnp.array(document_ST)[None], jnp.array(reset_S)[None]

    def run(documents):
        document_1ST, reset_1S = lay_out(documents)
        memory = jax.tree.map(lambda x: _lanes(model, x, 1), random_memory(model, params))  # stale: must not be seen
        batch = jnp.array(np.where(np.array(document_1ST) > 0, text.reshape(1, -1, T), 9))
        logits, memory = segments(
            model, params, batch, memory, reset_BS=reset_1S, document_BST=document_1ST, schedule=schedule
        )
        return logits.reshape(total, V), memory

    together, bank = run({1, 2, 3})
    for number, (start, length) in enumerate(zip(starts, lengths, strict=False), 1):
        alone, bank_alone = run({number})
        assert_same(together[start : start + length], alone[start : start + length])
    assert_same(bank, bank_alone)


def test_gradient_reaches_through_all_segments():
    """What a segment writes is trained by the loss of every later one."""
    for kind in KINDS[:-1]:
        model, params = make(kind=kind)

        def last_logits(memory, model=model, params=params):
            logits, _ = segments(model, params, tokens(), memory)
            return jnp.sum(jnp.sin(logits[:, -1]))

        gradient = jax.grad(last_logits)(random_memory(model, params))
        assert all(float(jnp.max(jnp.abs(g))) > 1e-8 for g in jax.tree.leaves(gradient))


def test_convex_gates_bound_the_bank():
    model, params = make()
    memory = model.init_memory(B, params)
    for seed in range(40):
        _, memory = segments(model, params, tokens(seed=seed), memory)
    assert float(jnp.max(jnp.abs(memory))) <= 1


def test_memory_matters():
    """What stood in an earlier segment changes later logits for every memory, and nothing for none."""
    for kind in KINDS:
        model, params = make(kind=kind)
        memory, batch = model.init_memory(B, params), tokens()
        logits, _ = segments(model, params, batch, memory)
        changed, _ = segments(model, params, batch.at[:, 0].set(0), memory)
        moved = float(jnp.max(jnp.abs(logits[:, -1] - changed[:, -1])))
        assert moved == 0 if kind == "none" else moved > 1e-4


def test_rmt_starts_from_its_learned_tokens():
    model, params = make(kind="rmt")
    np.testing.assert_array_equal(model.init_memory(2, params)[1], params["memory_tokens"])
    np.testing.assert_array_equal(model.init_memory(2), np.zeros((2, 5, 32)))

    def loss(params):
        logits, _ = segments(
            model, params, tokens(), random_memory(model, params), reset_BS=jnp.arange(S)[None] == jnp.array([[1]] * B)
        )
        return jnp.sum(jnp.sin(logits))

    assert float(jnp.max(jnp.abs(jax.grad(loss)(params)["memory_tokens"]))) > 1e-6


def test_rope_without_and_with_llama3_scaling():
    """The public formula, and what it leaves alone: fast turns keep, slow ones shrink by the factor."""
    config = parse_config("", ("model.rope_scaling={}", "model.rope_theta=500000"))
    plain, scaled = rope_frequencies(64, 5e5, None), rope_frequencies(64, 5e5, config.model.rope_scaling)
    np.testing.assert_allclose(np.asarray(plain)[[0, 1, 31]], [1, 5e5 ** (-2 / 64), 5e5 ** (-62 / 64)], rtol=1e-5)
    np.testing.assert_allclose(scaled[0], plain[0])
    np.testing.assert_allclose(scaled[-1], plain[-1] / 32, rtol=1e-6)
    assert bool(jnp.all((scaled <= plain * (1 + 1e-6)) & (scaled >= plain / 32 * (1 - 1e-6))))


def test_conv_sees_nothing_across_edges():
    conv = CausalConv(4)
    x = jax.random.normal(jax.random.key(0), (1, 2, 6, 3))
    document = jnp.array([[[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]])
    layout = Layout(document, jnp.broadcast_to(jnp.arange(6), document.shape), jnp.zeros((1, 2), bool), packed=True)
    params = conv.init(jax.random.key(1), x, layout)
    kernel = params["params"]["kernel"].value
    y, _ = conv.apply(params, x, layout)
    np.testing.assert_allclose(y[0, 0, 3], x[0, 0, 3] * kernel[0], rtol=1e-5)
    np.testing.assert_allclose(y[0, 1, 0], x[0, 1, 0] * kernel[0], rtol=1e-5)
    expected = sum(x[0, 1, 5 - back] * kernel[back] for back in range(4))
    np.testing.assert_allclose(y[0, 1, 5], expected, rtol=1e-5)
