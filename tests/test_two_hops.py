"""Two-hop questions are sorted by what their stories tell, and counted by what the model says."""

import jax
import numpy as np
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.data.babi.files import Question, Statement
from lm2_jax.inspection.two_hops import FATES, make_questions, predict_answers, table, two_hops
from lm2_jax.model import build_model
from lm2_jax.segments import run_segments
from lm2_jax.tokenizer import load_tokenizer

T, S, B = 32, 4, 24
CONFIG = f"""
model: {{vocab_size: 185, d_model: 16, num_layers: 2, num_heads: 2, num_kv_heads: 2, d_ff: 16, conv_width: 4}}
memory: {{num_slots: 3, num_heads: 2}}
data: {{batch_size: 4, segment_length: {T}, segments_per_window: {S}, stories: {{tasks: [qa2], facts: [2, 8]}}}}
"""


@pytest.mark.parametrize(
    ("told", "fate", "handled", "moved", "person_now"),
    [
        ("Mary went to the office. Mary took the milk. John went to the garden.", 0, 1, 0, "office"),
        ("Mary took the milk. Mary went to the office. Mary moved to the garden.", 1, 0, 2, "garden"),
        ("Mary went to the office. Mary took the milk. Mary left the milk there.", 2, 2, 0, "office"),
        ("Mary went to the office. Mary dropped the milk. Mary went back to the garden.", 3, 1, 0, "garden"),
    ],
)
def test_two_hops(told, fate, handled, moved, person_now):
    story = *map(Statement, told.replace(". ", ".|").split("|")), Question("Where is the milk?", "office")
    hops = two_hops(story)
    assert (hops.fate, hops.handled, hops.moved, hops.person_now) == (FATES[fate], handled, moved, person_now)


def test_questions_and_answers():
    """The two statements stand where they are said to; what comes out is what the whole window gives."""
    config = parse_config(CONFIG)
    model, tokenizer = build_model(config), load_tokenizer(config.tokenizer)
    questions = make_questions(config, tokenizer, S, B)
    for b in range(B):
        segments = [tokenizer.decode(tokens_T) for tokens_T in questions.tokens_BST[b]]
        before = tokenizer.decode(questions.tokens_BST[b, -1, : questions.asked_B[b] + 1])
        assert before.endswith("?")
        thing = before.removesuffix("?").split()[-1]
        later = S - 1 - questions.age_B[b]
        told = segments[later] + segments[later - questions.apart_B[b]]
        place = tokenizer.decode([questions.target_B[b]])
        assert thing in told and f"to the {place}." in told
        assert questions.fate_B[b] == FATES[3] or questions.lure_B[b] == questions.target_B[b]

    params = model.init_params(jax.random.key(0))
    logits_BSTV, _ = run_segments(model, params, questions.tokens_BST, model.init_memory(B, params))
    guess_B = predict_answers(model, params, questions)
    np.testing.assert_array_equal(guess_B, np.argmax(logits_BSTV[np.arange(B), -1, questions.asked_B], axis=-1))


def test_table():
    config, count = parse_config(CONFIG), 8 * B
    questions = make_questions(config, load_tokenizer(config.tokenizer), S, count)
    lured = sum(questions.lure_B != questions.target_B)
    assert lured
    report = table(questions, questions.lure_B)
    assert f"| all | {count} | {1 - lured / count:.1%} | {lured / count:.1%} |" in report
    assert f"| {FATES[0]} | {sum(questions.fate_B == FATES[0])} | 100.0% | 0.0% |" in report


def test_contexts_that_are_too_short_for_a_story():
    config = parse_config(CONFIG, ["data.stories.facts=[8, 20]"])
    with pytest.raises(UserError, match=r"--segments 2: 8 facts and a question need 72 tokens, 3 segments"):
        make_questions(config, load_tokenizer(config.tokenizer), 2, B)
