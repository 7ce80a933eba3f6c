"""bAbI stories as documents: scattering, sources and the stories' tokenizer."""

import collections
import itertools
import pickle
import re

import numpy as np
import pytest
from story_helpers import PLACES, TASKS, TOKENIZER, contains_in_order, story_of, write

from lm2_jax.common.errors import UserError
from lm2_jax.config import DataConfig, StoriesConfig
from lm2_jax.data.babi.background import BACKGROUND_LEXICON
from lm2_jax.data.babi.files import is_held_out
from lm2_jax.data.babi.scatter import Scatterer
from lm2_jax.data.babi.sources import QuestionSource, StoryFiles, StorySource
from lm2_jax.data.babi.world import LEXICON, generate_story
from lm2_jax.tokenizer import SpecialTokens, StoriesTokenizer

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
        assert (document.tokens[0], document.tokens[-1]) == (TOKENIZER.special.bos_id, TOKENIZER.special.eos_id)
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

    vocab_size, special = 256, SpecialTokens()

    def encode(self, text):
        return list(text.encode())


def test_spaces_between_pieces_and_no_control_tokens():
    for seed in range(10):
        document = Scatterer(CharacterTokenizer(), 300).scatter(STORY, np.random.default_rng(seed))
        text = bytes(document.tokens.tolist()).decode()
        assert len(text) == 301
        assert text[0].isupper() and " John moved to the garden." in text
        assert text.endswith("Where is John? garden. Where is Mary? hallway.")
        assert bytes(document.tokens[document.answers].tolist()) == b" office garden hallway"


class MergingTokenizer(CharacterTokenizer):
    """Pieces of bytes with the space before them, as SentencePiece has them: a text's first word takes more ids."""

    def encode(self, text):
        return list(re.sub(r" [A-Z][a-z]", "#", text).encode())


@pytest.mark.parametrize("tokenizer", [CharacterTokenizer(), MergingTokenizer()])
def test_documents_are_full_whatever_comes_first(tokenizer):
    exact = Scatterer(tokenizer, 10**6).length(STORY)
    for budget, seed in itertools.product((exact - 1, exact, exact + 1, exact + 2, 300), range(10)):
        assert len(Scatterer(tokenizer, budget).scatter(STORY, np.random.default_rng(seed)).tokens) == budget + 1


def test_a_gap_lies_between_the_last_statement_and_the_questions():
    def behind(gap, seed):
        document = Scatterer(TOKENIZER, 100, gap=gap).scatter(STORY, np.random.default_rng(seed))
        text = TOKENIZER.decode(document.tokens)
        told = text.index("mary went back to the hallway.") + len("mary went back to the hallway.")
        return len(TOKENIZER.encode(text[told : text.index("where is john?")]))

    background = Scatterer(TOKENIZER, 100).room - Scatterer(TOKENIZER, 100).length(STORY)
    assert 20 <= min(behind(20, seed) for seed in range(20)) < 30
    assert {behind(100, seed) for seed in range(5)} == {background}
    assert min(behind(0, seed) for seed in range(20)) < 20


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
