"""The needle in a haystack: its words, its questions, and documents of any length around it."""

import numpy as np
import pytest
from helpers import quick_training, tiny_config
from story_helpers import TOKENIZER

from lm2_jax.config import DataConfig, StoriesConfig
from lm2_jax.data.babi.files import is_held_out
from lm2_jax.data.babi.needle import needle_story, repeated_passage
from lm2_jax.data.babi.sources import QuestionSource, StorySource
from lm2_jax.training.loop import train

NEEDLE = DataConfig(stories=StoriesConfig(tasks=["niah"]))


def stories(count, seed=0):
    rng = np.random.default_rng(seed)
    return [needle_story(rng) for _ in range(count)]


def test_words_are_those_of_the_stories():
    passage = repeated_passage(np.random.default_rng(0))
    first, again = [[next(passage) for _ in range(5)] for _ in range(2)]
    assert first == again and len(set(first)) == 5
    for text in (*first, *(line.text for story in stories(200) for line in story)):
        assert TOKENIZER.unk_id not in TOKENIZER.encode(text) and len(TOKENIZER.encode(text)) <= 9


def test_a_question_is_about_its_statement():
    for statement, question in stories(200):
        what, whose = statement.text.split()[1], statement.text.split()[4]
        assert what != whose
        assert statement.text == f"The {what} of the {whose} is {question.answer}."
        assert question.text == f"What is the {what} of the {whose}?"
    assert len({question.answer for _, question in stories(2000)}) == 16
    assert len({question.text for _, question in stories(20000)}) == 24 * 23
    held_out = np.mean([is_held_out(story) for story in stories(4000)])
    assert held_out == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.parametrize("budget", [32, 64, 512])
def test_documents_hold_the_needle_somewhere_and_end_in_the_question(budget):
    questions = QuestionSource(NEEDLE, TOKENIZER, budget=budget, seed=0, count=40)
    places = []
    for index in range(40):
        document = questions[index]
        assert len(document.tokens) == budget + 1
        text = TOKENIZER.decode(document.tokens)
        answer = TOKENIZER.decode(document.tokens[document.answers])
        key = text[text.index("what is the ") + len("what is the ") : -len(f"? {answer}.")]
        assert text.endswith(f"what is the {key}? {answer}.") and text.count(f"the {key} is {answer}.") == 1
        places.append(text.index(f"the {key} is") / len(text))
    assert budget < 512 or (min(places) < 0.2 and max(places) > 0.7)
    assert budget < 512 or text.count("no village sleeps always at noon.") > 5


def test_training_and_questions_share_no_needle():
    training = StorySource(NEEDLE, TOKENIZER, budget=64, seed=0, held_out=False)
    questions = QuestionSource(NEEDLE, TOKENIZER, budget=64, seed=0, count=100)

    def told(document):
        text = TOKENIZER.decode(document.tokens)
        key = text[text.index("what is the ") + len("what is the ") : text.index("?")]
        return key, TOKENIZER.decode(document.tokens[document.answers])

    assert not {told(training[i]) for i in range(500)} & {told(questions[i]) for i in range(100)}


def test_a_model_is_trained_and_asked(tmp_path):
    config = tiny_config(
        tmp_path / "run", "data.stories.tasks=[niah]", "train.steps=2", "train.curriculum=[]", "eval.lengths=[2, 4]"
    )
    with quick_training():
        summary = train(config)
    cells = [(cell["questions"], cell["segments"]) for cell in summary["accuracy_by_length"]]
    assert cells == [("niah (generator)", 2), ("niah (generator)", 4)]
