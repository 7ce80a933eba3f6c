"""Log-likelihoods and texts for lm-evaluation-harness, against texts read by hand."""

import functools

import jax
import numpy as np
import pytest
from evaluated import T, load, make_checkpoint, make_model, needs_harness, score
from helpers import on_one_device, random_checkpoint

from lm2_jax.common.errors import UserError
from lm2_jax.decoding.sampling import generate
from lm2_jax.evals import scoring
from lm2_jax.parallel.mesh import use_mesh
from lm2_jax.segments import run_segments


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes the directory of a model of a kind, once."""
    return functools.partial(make_checkpoint, tmp_path_factory.mktemp("models"))


# --- Scores --------------------------------------------------------------------------------------------------------


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [[256, *rng.integers(0, 256, length - 1).tolist()] for length in lengths]


def requests():
    """Of any length; ending at, before and after a segment's end; some that read the same, some asked twice."""
    long = texts(3 * T + 5, 2 * T, T + 1, T, 9, 2)
    pairs = [(text[:n], text[n:]) for text in long for n in {1, len(text) // 2, len(text) - 1} if n < len(text)]
    choices = [(long[0], [token]) for token in (5, 77, 200)]
    return [*pairs, *choices, pairs[0], ([7], [8])]


def by_hand(loaded, context, continuation):
    """One text in one row, whole segments; what pads the last one comes after all that counts."""
    model, text = loaded.model, [*context, *continuation]
    tokens_1ST = np.zeros((1, -(-len(text) // T), T), np.int32)
    tokens_1ST.reshape(-1)[: len(text)] = text
    memory = model.init_memory(1, loaded.params)
    logits_1STV, _ = _reader(model)(loaded.params, tokens_1ST, memory)
    log_PV = np.asarray(jax.nn.log_softmax(logits_1STV, axis=-1)).reshape(tokens_1ST.size, -1)
    before_PV = log_PV[len(context) - 1 : len(text) - 1]
    chosen_P = before_PV[np.arange(len(continuation)), continuation]
    return chosen_P.sum(), bool((before_PV.argmax(axis=-1) == continuation).all())


@functools.cache
def _reader(model):
    return jax.jit(lambda params, tokens_BST, memory: run_segments(model, params, tokens_BST, memory))


@pytest.mark.parametrize("kind", ["lm2", "rmt", "none"])
def test_scores_are_those_of_texts_read_by_hand(kind, checkpoint):
    with on_one_device():
        loaded = load(checkpoint(kind), "data.batch_size=3")
    context = texts(2 * T)[0]
    (greedy,) = generate(loaded.model, loaded.params, [context], max_new_tokens=T + 3)
    asked = [*requests(), (context, greedy), (context, [*greedy[:-1], greedy[-1] ^ 1])]
    found = score(loaded, asked)
    for (log, is_greedy), pair in zip(found, asked, strict=True):
        right = by_hand(loaded, *pair)
        assert log == pytest.approx(right[0], abs=1e-4)
        assert is_greedy == right[1]
    assert [is_greedy for _, is_greedy in found[-2:]] == [True, False]


def test_scores_do_not_depend_on_the_batch(checkpoint):
    with on_one_device():
        alone = score(load(checkpoint("lm2"), "data.batch_size=1"), requests())
        together = score(load(checkpoint("lm2"), "data.batch_size=8"), requests())
    sharded = score(load(checkpoint("lm2")), requests())  # over eight devices
    for other in (together, sharded):
        for (log, greedy), (right, also) in zip(other, alone, strict=True):
            assert log == pytest.approx(right, abs=1e-4)
            assert greedy == also


def test_equal_readings_are_read_once(checkpoint, monkeypatch):
    read, rows = scoring._read, []

    def count(loaded, step, memory, batch):
        rows.extend(batch)
        return read(loaded, step, memory, batch)

    monkeypatch.setattr(scoring, "_read", count)
    context = texts(20)[0]
    score(load(checkpoint("lm2")), [(context, [token]) for token in range(20)] + [(context[:5], [*context[5:], 3])])
    assert len(rows) == 1


def test_what_looks_ahead_is_refused(tmp_path):
    sizes = ("memory={kind: official, num_slots: 16, num_heads: 2}", "data.segment_length=16", "data.batch_size=8")
    loaded = load(random_checkpoint(tmp_path / "model", *sizes))
    with pytest.raises(UserError, match="look ahead"):
        score(loaded, [([1], [2])])


# --- The harness's model -------------------------------------------------------------------------------------------


def ask(loaded, kind, *arguments, **options):
    from lm_eval.api.instance import Instance

    instances = [Instance(request_type=kind, doc={}, arguments=x, idx=i) for i, x in enumerate(arguments)]
    with use_mesh(loaded.mesh):
        return getattr(make_model(loaded, **options), kind)(instances)


@needs_harness
def test_log_likelihoods_of_text(checkpoint):
    """Contexts begin with the begin token, an empty one is that alone; a space before the cut goes to its right."""
    loaded = load(checkpoint("lm2"))
    asked = (("Where is Mary?", " In the garden."), ("", "née"), ("It is ", "late"), (" ", "late"))
    found = ask(loaded, "loglikelihood", *asked)
    begin, encode = 256, loaded.tokenizer.encode
    pairs = [
        ([begin, *encode("Where is Mary?")], encode(" In the garden.")),
        ([begin], encode("née")),
        ([begin, *encode("It is")], encode(" late")),
        ([begin], encode(" late")),
    ]
    for (log, greedy), right in zip(found, score(loaded, pairs), strict=True):
        assert log == pytest.approx(right[0], abs=1e-4) and greedy == right[1]


@needs_harness
def test_whole_texts(checkpoint):
    loaded = load(checkpoint("lm2"))
    long = "Call me Ishmael. " * 9
    found = ask(loaded, "loglikelihood_rolling", ("",), (long,), ("a",))
    assert found.pop(0) == 0
    expected = [log for log, _ in score(loaded, [([256], loaded.tokenizer.encode(text)) for text in (long, "a")])]
    assert found == pytest.approx(expected, abs=1e-3)


PROMPTS = ("Where is Mary?", "A much longer prompt, over several segments, that ends in the middle of", "")


@needs_harness
def test_texts_end_at_stop_strings(checkpoint):
    loaded = load(checkpoint("lm2"))
    prompts = [[256, *loaded.tokenizer.encode(prompt)] for prompt in PROMPTS]
    written = generate(loaded.model, loaded.params, prompts, max_new_tokens=20, stop_ids=[257])
    whole = [loaded.tokenizer.decode(ids) for ids in written]
    assert ask(loaded, "generate_until", *((p, {"until": [], "max_gen_toks": 20}) for p in PROMPTS)) == whole
    stop = whole[1][4:6]
    options = {"until": [stop, "nowhere"], "max_new_tokens": 20, "do_sample": False, "temperature": 0.7}
    stopped = ask(loaded, "generate_until", *((prompt, options) for prompt in PROMPTS))
    assert stopped == [text.partition(stop)[0] for text in whole] != whole


@needs_harness
def test_drawn_texts_differ_by_request_alone(checkpoint):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.95}
    asked = [(prompt, options) for prompt in (PROMPTS[0], *PROMPTS)]
    found = ask(load(checkpoint("lm2")), "generate_until", *asked)
    with on_one_device():
        assert found == ask(load(checkpoint("lm2"), "data.batch_size=1"), "generate_until", *asked)
    assert found[0] != found[1]  # drawn twice
    assert found[0] != ask(load(checkpoint("lm2")), "generate_until", (PROMPTS[0], options | {"do_sample": False}))[0]
    with pytest.raises(UserError, match="num_beams 4"):
        ask(load(checkpoint("lm2")), "generate_until", (PROMPTS[0], {"num_beams": 4}))


@needs_harness
def test_a_text_without_a_token_is_refused(checkpoint):
    with pytest.raises(UserError, match="the continuation '' has no token of its own"):
        ask(load(checkpoint("lm2")), "loglikelihood", ("a", ""))
