"""Retrieval for BABILong: the ranking against its formula, and what the model is given to read."""

import math
import re

import numpy as np
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.data.babi.babilong import Sample
from lm2_jax.evals import babilong, retrieval
from lm2_jax.tokenizer import load_tokenizer

pytest.importorskip("bm25s", reason="bm25s is not installed (requirements-dev.txt)")

CONTEXT = (
    "Mary went to the kitchen. The old lantern glows. John moved to the garden. "
    "A grey cloud hangs over the hill. Mary went to the office. The lantern is out."
)


def ranked(sentences, question, k1=1.5, b=0.75):
    """Scores by the formula that Lucene computes; Robertson and Zaragoza (2009), section 3, but for its idf."""
    documents = [re.findall(r"\w+", sentence.lower()) for sentence in sentences]
    mean, count = np.mean([len(words) for words in documents]), len(documents)

    def score(words):
        total = 0.0
        for word in re.findall(r"\w+", question.lower()):
            holding = sum(word in document for document in documents)
            idf = math.log(1 + (count - holding + 0.5) / (holding + 0.5))
            times = words.count(word)
            total += idf * times / (times + k1 * (1 - b + b * len(words) / mean))
        return total

    return [score(words) for words in documents]


@pytest.mark.parametrize("question", ["Where is Mary?", "Where is the lantern?", "Where is John now, over the hill?"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sentences_are_those_that_the_formula_ranks_first(question, count):
    sentences = re.split(r"(?<=\.) ", CONTEXT)
    scores = ranked(sentences, question)
    best = sorted(range(len(sentences)), key=lambda index: (-scores[index], -index))[:count]
    expected = " ".join(sentences[index] for index in sorted(best))
    assert retrieval.find_sentences(CONTEXT, question, count) == expected


def test_of_equal_sentences_the_later_are_taken():
    context = "Mary went to the kitchen. Mary went to the bedroom. Mary went to the office. A cloud."
    assert (
        retrieval.find_sentences(context, "Where is Mary?", 2) == "Mary went to the bedroom. Mary went to the office."
    )
    assert retrieval.find_sentences("A cloud. A hill.", "Where is Mary?", 5) == "A cloud. A hill."
    assert retrieval.find_sentences("A cloud. A hill.", "???", 1) == "A hill."
    assert retrieval.find_sentences("", "Where is Mary?", 2) == ""


@pytest.mark.parametrize("prompt", ["plain", "official"])
def test_the_model_reads_what_was_found(prompt):
    tokenizer = load_tokenizer(parse_config("tokenizer: {kind: bytes}").tokenizer)
    sample = Sample(CONTEXT, "Where is Mary?", "office")
    settings = f"eval: {{babilong: {{prompt: {prompt}, retrieval: bm25, retrieved: 2}}}}"
    found = parse_config(settings).eval.babilong
    text = tokenizer.decode(babilong.encode_prompt(sample, "qa1", found, tokenizer))
    assert retrieval.find_sentences(CONTEXT, sample.question, 2) in text
    assert "garden. A grey cloud" not in text
    assert text.rstrip().endswith("Where is Mary?")


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(retrieval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bm25s is missing; pip install 'bm25s"):
        retrieval.check_retrieval()
