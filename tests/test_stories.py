"""bAbI stories: reader, solver against the real files, generator, background."""

import collections
import itertools

import numpy as np
import pytest
from story_helpers import PLACES, REAL_FILES, TASKS, TOKENIZER, needs_babi, statements, words, write

from lm2_jax.common.errors import UserError
from lm2_jax.data.babi.background import BACKGROUND_LEXICON, BookBackground, builtin_sentences, split_sentences
from lm2_jax.data.babi.files import Question, Statement, question_samples, read_babi
from lm2_jax.data.babi.scatter import Scatterer
from lm2_jax.data.babi.world import LEXICON, World, generate_story

# --- Files ---------------------------------------------------------------------------------------------------------


@needs_babi
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: f"{path.parent.name}-{path.name[:3]}-{path.stem[-4:]}")
def test_solver_agrees_with_every_real_question(path):
    asked = several = 0
    for story in read_babi(path):
        world = World()
        for line in story:
            if isinstance(line, Statement):
                world.tell(line.text)
                continue
            asked += 1
            answers = world.answers(line.text)
            if len(answers) == 1:
                assert answers[0] == line.answer, (line, story)
            else:  # bAbI asks "What did Bill give to Jeff?" after two gifts and means either
                several += 1
                assert line.text.startswith("What did") and line.answer in answers, (line, story)
    assert asked >= 1000
    assert several == 0 if "qa5" not in path.name else several / asked < 0.02


@needs_babi
def test_lexicon_is_that_of_the_real_files():
    real = {
        word
        for path in REAL_FILES
        for story in read_babi(path)
        for line in story
        for word in words(line.text) + ([line.answer] if isinstance(line, Question) else [])
    }
    assert real == set(LEXICON)
    assert list(LEXICON) == sorted(LEXICON)


@pytest.mark.parametrize("mark", ["\t", "|"])
def test_reader_and_babilong_samples(tmp_path, mark):
    content = (
        "1 Mary went to the office.\n2 Where is Mary? \toffice\t1\n3 John moved to the garden.\n"
        "4 Where is John?\tgarden\t3\n1 Mary took the milk.\n2 What is Mary carrying?\tmilk,apple\t1\n"
    )
    path = write(tmp_path / "qa.txt", content.replace("\t", mark))
    first, second = read_babi(path)
    where_mary, where_john = Question("Where is Mary?", "office"), Question("Where is John?", "garden")
    mary, john = Statement("Mary went to the office."), Statement("John moved to the garden.")
    assert first == (mary, where_mary, john, where_john)
    assert second[-1].answer == "milk,apple"
    assert list(question_samples(first)) == [(mary, where_mary), (mary, john, where_john)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        (b"1 Caf\xe9.\n", "byte 5 is not UTF-8"),
        ("1 Mary went to the office.\nJohn left.\n", "line 2: found 'John left.'"),
        ("1 Mary went to the office.\n3 John left.\n", "line 2: .*the number should be 2"),
        ("2 Mary went to the office.\n", "line 1: .*should be 1"),
        ("1 Mary went to the office.\n2 Where is Mary?\n", "line 2: .*a question is followed by a tab"),
        ("1 Mary went to the office.\n2 Where is Mary? ||1\n", "line 2: .*a question is followed by a tab"),
        ("1 Mary went to the office.\n2 Where is Mary?\t\t1\n", "line 2: .*a question is followed by a tab"),
    ],
)
def test_reader_names_the_mistake(tmp_path, content, message):
    path = write(tmp_path / "broken.txt", content)
    with pytest.raises(UserError, match=message) as error:
        read_babi(path)
    assert str(path) in str(error.value)


def test_reader_of_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_babi(tmp_path / "none.txt")


# --- Generator -----------------------------------------------------------------------------------------------------


def stories(task, count=300, facts=6, between=2, after=3):
    return [generate_story(task, np.random.default_rng(i), facts, between, after) for i in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_generated_stories_agree_with_the_solver(task):
    for story in stories(task):
        for i, line in enumerate(story):
            if isinstance(line, Question):
                world = World()
                for told in statements(story[:i]):
                    world.tell(told)
                assert world.answers(line.text) == (line.answer,)
        final = list(itertools.takewhile(lambda line: isinstance(line, Question), reversed(story)))
        assert 1 <= len(final) == len({line.text for line in final}) <= 3
        assert {word for line in story for word in words(line.text)} <= set(LEXICON)


def test_questions_between_are_of_any_task():
    story = generate_story("qa3", np.random.default_rng(0), 40, 30, 2, asked_between=("qa1", "qa2", "qa3"))
    forms = [" ".join(words(line.text)[:3]) for line in story if isinstance(line, Question)]
    assert {"Where is Mary", "Where is the", "Where was the"} < set(forms[:-2])
    assert set(forms[-2:]) == {"Where was the"}


def test_the_number_of_facts_and_questions_is_the_one_asked_for():
    assert {len(statements(story)) for story in stories("qa1", facts=7)} == {7}
    assert {len(story) for story in stories("qa1", facts=7, between=3, after=1)} == {11}
    assert {len(statements(story)) for story in stories("qa4", facts=9)} == {5}
    for task in ("qa2", "qa3", "qa5"):
        lengths = [len(statements(story)) for story in stories(task, facts=40)]
        assert min(lengths) == 40 and np.mean(lengths) < 42


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_spread_evenly(task):
    answers = collections.Counter(story[-1].answer for story in stories(task, count=1200, after=1))
    kinds = [PLACES] if task != "qa5" else [{"apple", "football", "milk"}, {"Bill", "Fred", "Jeff", "Mary"}]
    assert set(answers) == set().union(*kinds)
    for kind in kinds:
        counts = [answers[label] for label in kind]
        assert max(counts) < 1.5 * min(counts), answers


def test_questions_are_not_about_the_last_statement_only():
    late = [story[-1].text.split()[-1] in story[-2].text for story in stories("qa1", facts=8, after=1)]
    last = [story[-1].text[9:-1] == story[-2].text.split()[0] for story in stories("qa1", facts=8, between=0, after=1)]
    assert not any(late)
    assert 0.15 < np.mean(last) < 0.45


@needs_babi
@pytest.mark.parametrize("task", TASKS)
def test_verbs_and_question_forms_are_as_frequent_as_in_babi(task):
    def shares(lines):
        names = set(LEXICON) - {"The", "Where", "What", "Who", ".", "?"}
        names = {word for word in names if word[0].isupper()} | PLACES | {"apple", "football", "milk"}
        counts = collections.Counter(" ".join("_" if word in names else word for word in words(line)) for line in lines)
        return {form: count / sum(counts.values()) for form, count in counts.items()}

    real = [line for path in REAL_FILES if task in path.name for story in read_babi(path) for line in story]
    facts, between = (2, 0) if task == "qa4" else (60 if task == "qa3" else 16, 4)
    made = [line for story in stories(task, 400, facts, between, 1) for line in story]
    for kind in (Statement, Question):
        expected, found = (shares(line.text for line in lines if isinstance(line, kind)) for lines in (real, made))
        assert set(found) == set(expected)
        assert max(abs(found[form] - expected[form]) for form in expected) < 0.06, (expected, found)


def test_solver_refuses_what_it_cannot_know():
    world = World()
    world.tell("Mary went to the office.")
    assert world.answers("Where is John?") == () and world.answers("Where is Mary?") == ("office",)
    with pytest.raises(ValueError, match="no statement"):
        world.tell("Mary sings.")
    with pytest.raises(ValueError, match="no question"):
        world.answers("Why is Mary there?")


# --- Background ----------------------------------------------------------------------------------------------------


def test_builtin_sentences_share_no_content_word_with_stories():
    sentences = list(itertools.islice(builtin_sentences(np.random.default_rng(0)), 3000))
    assert {len(sentence.split()) for sentence in sentences} <= set(range(5, 10))
    assert {word for sentence in sentences for word in words(sentence)} == set(BACKGROUND_LEXICON)
    shared = {word.lower() for word in BACKGROUND_LEXICON} & {word.lower() for word in LEXICON}
    assert shared <= {"the", ".", "of", "is", "to"}


def test_books_are_read_in_order_and_wrap_round(tmp_path):
    numbered = [f"This is the sentence of ten words that has number {n}." for n in range(8)]
    book = write(tmp_path / "book.txt", "Preface. " + "\n".join(numbered) + " Too short. The end.")
    background = BookBackground([str(book)])
    read = list(itertools.islice(background.sentences(np.random.default_rng(1)), 20))
    start = numbered.index(read[0])
    assert read == [numbered[(start + i) % 8] for i in range(20)]
    with pytest.raises(UserError, match=r"no sentence of 10 words"):
        BookBackground([str(write(tmp_path / "short.txt", "Hello. You. There."))])
    with pytest.raises(UserError, match="matches no file"):
        Scatterer(TOKENIZER, 32, [str(tmp_path / "*.book")])


def test_sentence_ends():
    text = 'Mr. Bennet was\nso odd.  "Indeed!" She smiled. He asked why? J. Smith left'
    assert split_sentences(text) == [
        "Mr. Bennet was so odd.",
        '"Indeed!"',
        "She smiled.",
        "He asked why?",
        "J. Smith left",
    ]
