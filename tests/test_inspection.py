"""The look into the memory sees what the model does; its pictures and its page are whole."""

import base64
import functools
import json
import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from helpers import assert_drawn, random_checkpoint

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config, replace
from lm2_jax.data.babi.world import PEOPLE
from lm2_jax.inspection import drawing
from lm2_jax.inspection.reading import read_text, sketch, trace_segment
from lm2_jax.inspection.report import inspect
from lm2_jax.inspection.survival import answer_contexts, answers_by_age, make_contexts, probe
from lm2_jax.model import build_model
from lm2_jax.segments import run_segments
from lm2_jax.tokenizer import load_tokenizer

T, S, B = 24, 4, 16
CONFIG = f"""
model: {{vocab_size: 185, d_model: 16, num_layers: 2, num_heads: 2, num_kv_heads: 1, d_ff: 16, conv_width: 4}}
memory: {{num_slots: 3, num_heads: 2}}
data: {{batch_size: 4, segment_length: {T}, segments_per_window: {S}, stories: {{facts: [1, 4]}}}}
"""
OFFICIAL = ("memory.kind=official", "model.d_model=24", "memory.num_slots=24")
KINDS = [(), ("memory.num_layers=1", "memory.width=8"), ("memory.write=top_k",), ("memory.kind=rmt",), OFFICIAL]
KINDS += [(f"memory.kind={kind}", "memory.num_layers=1") for kind in ("armt", "delta", "ntm")]
SLOTS = {"memory.kind=armt": 6 * 16, "memory.kind=delta": 16}  # by features, not memory.num_slots


@functools.cache
def make(*overrides):
    model = build_model(parse_config(CONFIG, overrides))
    params = jax.jit(model.init_params)(jax.random.key(0))
    if "memory.kind=armt" in overrides:  # which stores nothing at first
        params["bank_blocks"]["memory"]["value"] += 0.1 * jax.random.normal(jax.random.key(1), (1, 16, 16))
    return model, params


@pytest.mark.parametrize("overrides", KINDS, ids=str)
def test_reading(overrides):
    model, params = make(*overrides)
    ids_n = np.arange(2 * T + 5) % 185
    trace = read_text(model, params, ids_n, last=10)
    L, N = model.spec.num_memory_layers or model.spec.model.num_layers, model.spec.memory.num_slots
    N = SLOTS.get(overrides[0] if overrides else "", N)
    assert trace.read_LKN.shape == (L, 10, N)
    assert trace.read_LSN.shape == (L, 3, N)
    assert trace.change_LSN.shape == trace.norm_LSN.shape == (len(trace.slots_LNM), 3, N)
    assert np.all(trace.read_LKN.sum(-1) < 1 + 1e-5)
    assert trace.segment_starts == [5]  # of the last 10 tokens, 5 are in the last segment
    assert set(trace.gates) <= {"input", "forget", "output"}
    # The memory is that of the model
    read = jax.jit(functools.partial(run_segments, model, params))
    memory = model.init_memory(1, params)
    for first in range(0, len(ids_n), T):
        before_LNM = np.asarray(model.kind.as_slots(memory))[:, 0]
        tokens_11T, document_11T = np.zeros((2, 1, 1, T), np.int32)
        piece = ids_n[first : first + T]
        tokens_11T[..., : len(piece)], document_11T[..., : len(piece)] = piece, 1
        _, memory = read(tokens_11T, memory, document_BST=document_11T)
    np.testing.assert_allclose(trace.slots_LNM, model.kind.as_slots(memory)[:, 0], atol=1e-5)
    before_LN, after_LN = (np.linalg.norm(x, axis=-1) for x in (before_LNM, trace.slots_LNM))
    assert before_LN.max() > 0
    change_LN = np.linalg.norm(trace.slots_LNM - before_LNM, axis=-1)
    change_LN /= np.maximum(np.where(before_LN > 0, before_LN, after_LN), 1e-9)
    np.testing.assert_allclose(trace.change_LSN[:, -1], change_LN, rtol=1e-3)


def test_weights_add_up():
    """To one; padding is not written."""
    model, params = make()
    tokens_BT, document_BT = np.arange(2 * T).reshape(2, T), np.ones((2, T), np.int32)
    document_BT[:, 20:] = 0
    _, trace = trace_segment(model, params, tokens_BT, model.init_memory(2, params), document_BT)
    np.testing.assert_allclose(trace.read_LBTN.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(trace.written_LBNT.sum(-1), 1, rtol=1e-5)
    assert not trace.written_LBNT[..., 20:].any() and (trace.written_LBNT[..., :20] > 0).all()


def test_answers():
    model, params = make()
    config = parse_config(CONFIG)
    contexts = make_contexts(config, load_tokenizer(config.tokenizer), S, B)
    read = jax.jit(functools.partial(run_segments, model, params))
    logits_BSTV, _ = read(contexts.tokens_BST, model.init_memory(B, params))
    guesses_B = np.argmax(logits_BSTV[np.arange(B), -1, contexts.asked_B], axis=-1)
    contexts.target_B[::2] = guesses_B[::2]  # half of the answers are what the model says
    contexts.target_B[1::2] = guesses_B[1::2] + 1
    answers = answer_contexts(model, params, contexts)
    np.testing.assert_array_equal(answers.right_B, np.arange(B) % 2 == 0)
    survival = answers_by_age(answers)
    assert len(survival.ages) == len(np.unique(contexts.age_B))
    first = answers.right_B[contexts.age_B == survival.ages[0]]
    assert survival.accuracy[0] == first.mean() and survival.low[0] <= survival.accuracy[0] <= survival.high[0]


def test_whose_statements_slots_take():
    """Slots that ask every token alike take a person's share of the tokens, where there is any."""
    model, params = make()
    contexts = make_contexts(parse_config(CONFIG), load_tokenizer(parse_config(CONFIG).tokenizer), S, B)
    queries = params["bank_blocks"]["memory"]["write_query"]
    params["bank_blocks"]["memory"]["write_query"] = np.zeros_like(queries)
    taken_LNP = answer_contexts(model, params, contexts).taken_LNP
    assert taken_LNP.shape == (*model.init_memory(1).shape[::2], len(PEOPLE))
    for p in range(len(PEOPLE)):
        share_BS = (contexts.person_BST == 1 + p).mean(-1)
        np.testing.assert_allclose(taken_LNP[..., p], share_BS[share_BS > 0].mean(), rtol=1e-5)


def test_contexts():
    config = parse_config(CONFIG)
    tokenizer = load_tokenizer(config.tokenizer)
    contexts = make_contexts(config, tokenizer, S, B)
    for b in range(B):
        segments = [tokenizer.decode(tokens_T) for tokens_T in contexts.tokens_BST[b]]
        person = segments[-1][: segments[-1].rindex("?")].split()[-1]
        assert tokenizer.decode(contexts.tokens_BST[b, -1, : contexts.asked_B[b] + 1]).endswith(f"where is {person}?")
        place = tokenizer.decode([contexts.target_B[b]])
        answering = segments[S - 1 - contexts.age_B[b]]
        assert person in answering and f"to the {place}." in answering
        told = tokenizer.decode(contexts.tokens_BST[b][contexts.person_BST[b] > 0])
        assert 1 <= told.count(".") <= 4 and told.count(".") == told.count(" to the ")
        for p, name in enumerate(PEOPLE, 1):
            about = tokenizer.decode(contexts.tokens_BST[b][contexts.person_BST[b] == p])
            assert about.lower().count(name.lower()) == about.count(".") == told.lower().count(name.lower())


def test_contexts_in_any_tokenizer():
    """In bytes a text's first line has one less than others with its words: the space in front of it."""
    changed = {"tokenizer": {"kind": "bytes"}, "data": {"segment_length": 64}}
    config = replace(parse_config(CONFIG), model={"vocab_size": 259}, **changed)
    tokenizer = load_tokenizer(config.tokenizer)
    contexts = make_contexts(config, tokenizer, S, 3 * B)
    openings = set()
    for tokens_ST, person_ST, asked in zip(contexts.tokens_BST, contexts.person_BST, contexts.asked_B, strict=True):
        assert tokenizer.decode(tokens_ST[-1, : asked + 1]).endswith("?")
        for p, name in enumerate(PEOPLE, 1):
            about = tokenizer.decode(tokens_ST[person_ST == p])
            assert about.count(name) == about.count(".") == about.count(" to the ")
        openings.add(bool(person_ST[0, :2].any()))
    assert openings == {True, False}


def test_probe_finds_what_is_there():
    """A memory of the last four segments is told apart from one that forgets at once."""
    rng = np.random.default_rng(0)
    ids_ST = rng.integers(200, size=(400, 12))
    words_SV = np.array([np.bincount(ids_T, minlength=200) for ids_T in ids_ST], float)
    recent_SF = np.concatenate([np.roll(words_SV, age, axis=0) for age in range(4)], axis=1)
    survival = probe(recent_SF, ids_ST.ravel(), 12)
    np.testing.assert_array_equal(survival.ages, [0, 1, 2, 4, 8, 16, 32])
    assert survival.accuracy[:3].min() > 0.5
    assert abs(survival.accuracy[3:].mean() - survival.chance) < 0.07
    assert survival.control[0] > 0.9 and survival.control[1:].max() < 0.25
    assert probe(recent_SF[:63], ids_ST[:63].ravel(), 12) is None


def test_sketch_keeps_inner_products():
    a_N, b_N = np.random.default_rng(0).standard_normal((2, 50_000))
    assert sketch(a_N).shape == (4096,)
    assert abs(sketch(a_N) @ sketch(a_N) / (a_N @ a_N) - 1) < 0.1
    assert abs(sketch(a_N) @ sketch(b_N)) / (a_N @ a_N) < 0.1
    np.testing.assert_array_equal(sketch(a_N[:9]), a_N[:9])


# --- Pictures and the page -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page loads, and its heat maps."""

    def __init__(self):
        super().__init__()
        self.loaded, self.maps, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loaded += [attributes[name] for name in ("src", "href") if name in attributes]
        if attributes.get("class") == "map":
            self.maps.append(json.loads(attributes["data-values"]))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "overrides",
    [
        ("memory.num_slots=2048", "memory.num_layers=1"),
        ("memory.kind=rmt",),
        ("memory.kind=official", "memory.num_slots=16"),
    ],
    ids=str,
)
def test_page_of_a_text(overrides, tmp_path, recwarn):
    path = random_checkpoint(tmp_path / "model", *overrides)
    (tmp_path / "text.txt").write_text("a b <c> & \u00e9\n" * 100, encoding="utf-8")
    written = inspect(str(path), tmp_path / "out", str(tmp_path / "text.txt"), tokens=20)
    check_page(written, {"tokens", "reads", "writes", "gates", "similarity", "survival"})
    assert not [warning for warning in recwarn if warning.category is UserWarning]


STORIES = ("model.vocab_size=185", "tokenizer.kind=stories")


@pytest.mark.parametrize("segments", [1, 6])
def test_page_of_a_story(segments, tmp_path, recwarn):
    path = random_checkpoint(tmp_path / "model", *STORIES)
    written = inspect(str(path), tmp_path / "out", segments=segments, questions=8)
    assert not [warning for warning in recwarn if warning.category in (UserWarning, RuntimeWarning)]
    check_page(written, {"tokens", "reads", "writes", "gates", "similarity", "survival", "facts", "people"})


def test_words_that_the_font_cannot_draw_are_spelt():
    assert drawing._short(" caf\u00e9\n") == "caf\u00e9\\n"
    assert drawing._short("\u65e5\u672c") == r"\u65e5\u672c"


def check_page(written, names):
    for path in written[1:]:
        assert_drawn(path)
    assert {path.stem for path in written} == names | {"index", "overview"}
    page = Page()
    page.feed(written[0].read_text(encoding="utf-8"))
    assert not page.open
    assert all(loaded.startswith("data:") for loaded in page.loaded)
    assert len([loaded for loaded in page.loaded if loaded.startswith("data:image/png")]) == len(names)
    assert not re.search(r"https?://|@import|url\(", written[0].read_text(encoding="utf-8"))
    for heat_map in page.maps:
        assert len(base64.b64decode(heat_map["float32"])) == 4 * len(heat_map["rows"]) * len(heat_map["columns"])
        assert len(heat_map["rows"]) <= drawing.MOST_COLUMNS and len(heat_map["columns"]) <= drawing.MOST_COLUMNS


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (("memory.kind=none",), {}, "memory.kind none: there is no memory to look into"),
        ((), {}, "--text is missing; .*not trained on stories"),
        ((), {"text": "not_there.txt"}, "--text: not_there.txt cannot be read"),
        ((), {"segments": 0, "tokens": -1}, "--segments: found 0; give 1 or more\n--tokens: found -1"),
        ((*STORIES, "data.stories.facts=[4, 10]"), {"segments": 1}, "--segments 1: 4 facts and a question need 40 tok"),
    ],
    ids=str,
)
def test_mistakes(overrides, arguments, message, tmp_path):
    path = random_checkpoint(tmp_path / "model", *overrides)
    with pytest.raises(UserError, match=message):
        inspect(str(path), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
