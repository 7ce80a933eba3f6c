"""bAbI stories: reader, solver against the real files, generator, scattering, sources and the stories' tokenizer."""

import collections
import itertools
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import DataConfig, StoriesConfig
from lm2_jax.data.babi.background import BACKGROUND_LEXICON, BookBackground, builtin_sentences, split_sentences
from lm2_jax.data.babi.files import Question, Statement, is_held_out, question_samples, read_babi
from lm2_jax.data.babi.scatter import Scatterer
from lm2_jax.data.babi.sources import QuestionSource, StoryFiles, StorySource
from lm2_jax.data.babi.world import LEXICON, World, first_answer, generate_story
from lm2_jax.tokenizer.stories import StoriesTokenizer

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
PLACES = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
BABI = Path(__file__).parents[2] / "shared" / "data" / "babi"
REAL_FILES = [*sorted(BABI.glob("en-10k/qa[1245]_*.txt")), *sorted(BABI.glob("en/qa[13]_*.txt"))]
needs_babi = pytest.mark.skipif(not REAL_FILES, reason=f"no bAbI files in {BABI}")
TOKENIZER = StoriesTokenizer()


def words(text):
    return text.replace("?", " ?").replace(".", " .").split()


def story_of(*texts):
    return tuple(Question(*text) if isinstance(text, tuple) else Statement(text) for text in texts)


def statements(story):
    return [line.text for line in story if isinstance(line, Statement)]


def contains_in_order(text, parts):
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


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
    with pytest.raises(ValueError, match="no answer"):
        first_answer(["Mary went to the office."], "Where is John?")
    with pytest.raises(ValueError, match="no statement"):
        first_answer(["Mary sings."], "Where is Mary?")
    with pytest.raises(ValueError, match="no question"):
        first_answer(["Mary went to the office."], "Why is Mary there?")


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


# --- Scattering ----------------------------------------------------------------------------------------------------

STORY = story_of(
    "Mary went to the office.",
    ("Where is Mary?", "office"),
    "John moved to the garden.",
    "Mary went back to the hallway.",
    ("Where is John?", "garden"),
    ("Where is Mary?", "hallway"),
)


@pytest.mark.parametrize("budget", [46, 47, 50, 64, 128, 500])
def test_scatter_keeps_the_story_and_fills_the_budget(budget):
    scatterer = Scatterer(TOKENIZER, budget)
    for seed in range(20):
        document = scatterer.scatter(STORY, np.random.default_rng(seed))
        assert len(document.tokens) == len(document.answers) == budget + 1
        assert document.tokens.dtype == np.int32 and document.answers.dtype == bool
        assert (document.tokens[0], document.tokens[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
        text = TOKENIZER.decode(document.tokens)
        lines = ["mary went to the office.", "where is mary? office.", "john moved to the garden."]
        assert contains_in_order(text, [*lines, "mary went back to the hallway."])
        assert text.endswith("where is john? garden. where is mary? hallway.")
        assert TOKENIZER.decode(document.tokens[document.answers]) == "office garden hallway"
        assert "<unk>" not in text


@pytest.mark.parametrize("budget", [64, 128, 500])
def test_every_seed_scatters_the_story_differently(budget):
    scatterer = Scatterer(TOKENIZER, budget)
    documents = [scatterer.scatter(STORY, np.random.default_rng(seed)) for seed in range(20)]
    assert len({document.tokens.tobytes() for document in documents}) == 20


def test_scatter_refuses_a_story_that_is_too_long():
    scatterer = Scatterer(TOKENIZER, 20)
    with pytest.raises(ValueError, match="above the budget of 20"):
        scatterer.scatter(STORY, np.random.default_rng(0))
    assert scatterer.longest_prefix(STORY) == STORY[:2]
    assert Scatterer(TOKENIZER, 8).longest_prefix(STORY) == ()


class CharacterTokenizer:
    """Characters; no begin and end ids."""

    vocab_size, bos_id, eos_id = 256, None, None

    def encode(self, text):
        return list(text.encode())


def test_spaces_between_pieces_and_no_control_tokens():
    for seed in range(10):
        document = Scatterer(CharacterTokenizer(), 300).scatter(STORY, np.random.default_rng(seed))
        text = bytes(document.tokens.tolist()).decode()
        assert 300 <= len(text) <= 301  # a first sentence without its space may leave one free
        assert text[0].isupper() and " John moved to the garden." in text
        assert text.endswith("Where is John? garden. Where is Mary? hallway.")
        assert bytes(document.tokens[document.answers].tolist()) == b" office garden hallway"


# --- Sources -------------------------------------------------------------------------------------------------------


def data(tasks=("qa1",), **kwargs):
    return DataConfig(stories=StoriesConfig(tasks=tasks, per_epoch=5000), **kwargs)


def equal(first, second):
    return np.array_equal(first.tokens, second.tokens) and np.array_equal(first.answers, second.answers)


def test_a_document_depends_on_seed_and_index_only():
    source = StorySource(data(TASKS), TOKENIZER, budget=96, seed=1, held_out=False)
    copy = pickle.loads(pickle.dumps(source))
    assert len(source) == 5000
    documents = [source[i] for i in (7, 3, 4999)]
    assert all(equal(copy[i], document) for i, document in zip((7, 3, 4999), documents, strict=True))
    assert not equal(documents[0], documents[1])
    assert not equal(documents[0], StorySource(data(TASKS), TOKENIZER, budget=96, seed=2, held_out=False)[7])
    with pytest.raises(IndexError):
        source[5000]


@pytest.mark.parametrize("budget", [32, 64, 128])
def test_sources_fill_their_budget(budget):
    source = StorySource(data(TASKS), TOKENIZER, budget=budget, seed=0, held_out=False)
    for i in range(100):
        document = source[i]
        assert len(document.tokens) == budget + 1 and document.answers.any()
    assert repr(source) == (
        f"StorySource(qa1,qa2,qa3,qa4,qa5, budget={budget}, seed=0, held_out=False, documents=5000)"
    )


def told(document):
    """The statements of a qa1 document, as written in the story."""
    found = re.findall(r"\b(?:daniel|john|mary|sandra) [a-z ]+ to the [a-z]+\.", TOKENIZER.decode(document.tokens))
    return " ".join(sentence.capitalize() for sentence in found)


def test_held_out_stories_are_not_trained_on():
    config = DataConfig(stories=StoriesConfig(facts=(1, 2)))
    train, held = (
        {told(StorySource(config, TOKENIZER, budget=64, seed=0, held_out=side)[i]) for i in range(400)}
        for side in (False, True)
    )
    assert not train & held
    assert all(is_held_out(story_of(text)) for text in held) and not any(is_held_out(story_of(text)) for text in train)
    questions = QuestionSource(config, TOKENIZER, budget=64, seed=5, count=100)
    assert all(is_held_out(story_of(told(questions[i]))) for i in range(100))


def test_questions_are_paired_over_lengths():
    sources = [QuestionSource(data(), TOKENIZER, budget=b, seed=3, count=50) for b in (96, 256, 512)]
    for i in range(50):
        documents = [source[i] for source in sources]
        assert len({told(document) for document in documents}) == 1
        assert len({TOKENIZER.decode(document.tokens[document.answers]) for document in documents}) == 1
        assert [len(document.tokens) for document in documents] == [97, 257, 513]
        assert all(document.answers.sum() == 1 and document.answers[-3] for document in documents)


def test_stories_alone():
    alone, among = (QuestionSource(data(), TOKENIZER, budget=b, seed=3, count=50) for b in (None, 512))
    for i in range(50):
        statements_alone, question = TOKENIZER.decode(alone[i].tokens).split(" where is ")
        assert statements_alone == told(among[i]).lower()
        assert TOKENIZER.decode(among[i].tokens).endswith(question)


FILE = "".join(
    f"1 Mary went to the {a}.\n2 Where is Mary?\t{a}\t1\n3 John went to the {b}.\n4 Where is John?\t{b}\t3\n"
    for a in sorted(PLACES)
    for b in sorted(PLACES)
)


def test_stories_and_questions_of_files(tmp_path):
    path = str(write(tmp_path / "qa1.txt", FILE))
    train, held = (StorySource(data(path=path), TOKENIZER, budget=64, seed=0, held_out=h) for h in (False, True))
    assert len(train) + len(held) == 36 and 0 < len(held) < 18
    assert all(train[i].answers.sum() == 2 for i in range(len(train)))
    short = StorySource(data(path=path), TOKENIZER, budget=24, seed=0, held_out=False)
    assert len(short) == len(train) and short[0].answers.sum() == 1

    questions = QuestionSource(data(), TOKENIZER, budget=64, seed=0, count=1000, files=StoryFiles((path,), "eval.path"))
    assert len(questions) == 72
    asked = collections.Counter(told(questions[i]).count(".") for i in range(72))
    assert asked == {1: 36, 2: 36}
    assert all(questions[i].answers.sum() == 1 for i in range(72))
    assert (
        len(QuestionSource(data(), TOKENIZER, budget=64, seed=0, count=10, files=StoryFiles((path,), "eval.path")))
        == 10
    )

    own = data(path=path, validation_path=path)
    assert [len(StorySource(own, TOKENIZER, budget=64, seed=0, held_out=h)) for h in (False, True)] == [36, 36]


def test_budgets_that_are_too_small(tmp_path):
    path = str(write(tmp_path / "qa1.txt", FILE))
    with pytest.raises(UserError, match=r"needs 13 tokens, a document has 12"):
        StorySource(data(path=path), TOKENIZER, budget=12, seed=0, held_out=False)
    assert len(StorySource(data(path=path), TOKENIZER, budget=13, seed=0, held_out=False))
    with pytest.raises(UserError, match=r"eval.path: .*a document has 12"):
        QuestionSource(data(), TOKENIZER, budget=12, seed=0, count=5, files=StoryFiles((path,), "eval.path"))
    with pytest.raises(UserError, match="12 tokens are too few for a story of qa3"):
        StorySource(data(("qa3",)), TOKENIZER, budget=12, seed=0, held_out=False)


# --- Tokenizer -----------------------------------------------------------------------------------------------------


def test_tokenizer_knows_every_word_and_nothing_else():
    ids = [TOKENIZER.encode(word) for word in (*LEXICON, *BACKGROUND_LEXICON)]
    assert all(len(i) == 1 and i[0] > 2 for i in ids)
    assert {i for (i,) in ids} == set(range(3, TOKENIZER.vocab_size))
    assert TOKENIZER.encode("Zebra, 7") == [0, 0, 0]
    assert TOKENIZER.decode([1, *TOKENIZER.encode("Where is Mary?"), *TOKENIZER.encode(" office."), 2]) == (
        "where is mary? office."
    )
    assert TOKENIZER.fingerprint() == StoriesTokenizer().fingerprint() and len(TOKENIZER.fingerprint()) == 16


def test_lines_are_kept_whole_in_segments():
    """No fact crosses a segment's end; without the setting many do; background makes the room, nothing is lost."""
    length, crossing = 16, {True: 0, False: 0}
    for whole in crossing:
        scatterer = Scatterer(TOKENIZER, 8 * length, segment_length=length if whole else None)
        for seed in range(60):
            rng = np.random.default_rng(seed)
            story = generate_story("qa1", rng, 6, 0, 1)
            document = scatterer.scatter(story, rng)
            assert len(document.tokens) == 8 * length + 1
            text, place = document.tokens.tolist(), 0
            for line in story:
                ids = TOKENIZER.encode(line.text)
                place = next(i for i in range(place, len(text)) if text[i : i + len(ids)] == ids)
                crossing[whole] += place // length != (place + len(ids) - 1) // length
    assert crossing[True] * 20 < crossing[False]  # what is left stands where no background follows
    assert crossing[False] > 40
