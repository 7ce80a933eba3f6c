"""BABILong: samples that keep the protocol, built or read."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import parse_config
from lm2_jax.data.babi.babilong import (
    BuiltSamples,
    Sample,
    babi_questions,
    find_samples,
    generated_questions,
    parse_length,
    read_samples,
)
from lm2_jax.data.babi.background import Books
from lm2_jax.data.babi.files import Question, Statement, question_samples
from lm2_jax.tokenizer import BytesTokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_babi = pytest.mark.skipif(not (SHARED / "babi").is_dir(), reason="the bAbI files are not on this machine")
needs_books = pytest.mark.skipif(not (SHARED / "books").is_dir(), reason="the books are not on this machine")

# --- Samples -------------------------------------------------------------------------------------------------------

WHERE = "Where is Mary?"
COUNTER = BytesTokenizer()


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two books of sentences that say which they are, every fifth one too short to be used."""
    folder = tmp_path_factory.mktemp("books")
    for book in ("A", "B"):
        sentences = [
            f"{book} {n}." if n % 5 == 0 else f"{book} says in sentence {n} that {'tide ' * (n % 7 + 1)}turns."
            for n in range(400)
        ]
        (folder / f"{book}.txt").write_text("\n".join(sentences), encoding="utf-8")
    return folder


def built(books, length, *, seed=0, count=20, task="qa1"):
    questions = generated_questions(task, parse_config("").data.stories, seed=3, count=count)
    background = Books([f"{books}/*.txt"]) if books else None
    return questions, BuiltSamples(questions, parse_length(length), COUNTER, background, (seed, 1), count)


def tokens(text):
    return len(COUNTER.encode(text))


@pytest.mark.parametrize("length", ["1k", "2k", "8k"])
def test_a_built_sample_keeps_the_protocol(books, length):
    questions, samples = built(books, length)
    texts = [p.read_text().replace("\n", " ") for p in sorted(books.glob("*"))]
    cut_at = set()
    for index, sample in enumerate(samples):
        *facts, question = questions[index]
        budget = parse_length(length) - 300
        assert abs(tokens(sample.context) - budget) <= 0.01 * budget
        assert (sample.question, sample.target) == (question.text, question.answer)
        rest, places = sample.context, []
        for fact in facts:  # all there, in order
            before, found, rest = rest.partition(fact.text)
            assert found
            places.append(before.strip())
        places.append(rest.strip())
        cut_at.add(sum(bool(place) for place in places))
        background = " ".join(place for place in places if place)
        kept, end = background.rsplit(". ", 1)  # the last sentence may be cut
        numbers = [(s.split()[0], int(s.split()[4])) for s in f"{kept}.".split(". ")]
        for (book, n), (other, following) in itertools.pairwise(numbers):  # natural order, short ones left out
            assert following == n + 1 + ((n + 1) % 5 == 0) if book == other else (n, following) == (398, 1)
        assert all(n % 5 and 0 < n < 399 for _, n in numbers)
        assert all(any(sentence in text for text in texts) for sentence in f"{kept}.".split(". "))
        assert any(end in text for text in texts)
    assert len(cut_at) > 1  # facts stand at different places


def test_facts_stand_alone_at_0k(books):
    questions, samples = built(books, "0k")
    for (*facts, _), sample in zip(questions, samples, strict=True):
        assert sample.context == " ".join(fact.text for fact in facts)


def test_the_same_seed_gives_the_same_sample(books):
    samples, again, other = (list(built(books, "2k", seed=seed)[1]) for seed in (0, 0, 1))
    assert samples == again
    assert all(one.context != another.context for one, another in zip(samples, other, strict=True))
    assert len({sample.context[-200:] for sample in samples}) == len(samples)
    _, random_access = built(books, "2k")
    assert random_access[7] == samples[7]


def test_longer_contexts_begin_with_the_background_of_shorter_ones(books):
    (questions, short), (_, long) = (built(books, length) for length in ("1k", "4k"))
    for (*facts, _), one, other in zip(questions, short, long, strict=True):
        background = []
        for text in (one.context, other.context):
            for fact in facts:
                text = text.replace(fact.text + " ", "", 1).replace(" " + fact.text, "", 1)
            background.append(text)
        assert background[1].startswith(background[0][:300])


def test_built_in_sentences():
    _, samples = built(None, "2k")
    assert all(abs(tokens(sample.context) - 1700) <= 17 for sample in samples)


def test_questions_whose_facts_are_too_long_are_left_out():
    fact, question = Statement("Mary went to the kitchen."), Question(WHERE, "kitchen")
    questions = [(*[fact] * n, question) for n in (5, 100, 6, 200)]
    assert len(BuiltSamples(questions, 1000, COUNTER, None, (0,), 9)) == 2
    assert len(BuiltSamples(questions, 0, COUNTER, None, (0,), 9)) == 4
    with pytest.raises(UserError, match="leave 700 for facts, and the shortest story has 2600"):
        BuiltSamples(questions[1:2], 1000, COUNTER, None, (0,), 9)


@needs_babi
@needs_books
def test_real_facts_in_real_books():
    questions, files = babi_questions(SHARED / "babi" / "en-10k", "qa2", seed=0)
    assert [path.name for path in files] == ["qa2_two-supporting-facts_test.txt"]
    assert len(questions) == 1000
    assert [p.name for p in babi_questions(SHARED / "babi" / "en-10k", "qa4", seed=0)[1]] == [
        "qa4_two-arg-relations_train.txt"
    ]
    samples = BuiltSamples(questions, 16_000, COUNTER, Books([str(SHARED / "books" / "*.txt")]), (0, 2), 3)
    for (*facts, _), sample in zip(questions, samples, strict=False):
        assert abs(tokens(sample.context) - 15_700) <= 157
        place = 0
        for fact in facts:
            place = sample.context.index(fact.text, place) + len(fact.text)


def test_question_lines_are_dropped():
    story = (Statement("a."), Question("b?", "b"), Statement("c."), Question("d?", "d"))
    assert [len(sample) for sample in question_samples(story)] == [2, 3]


ROWS = [{"input": f" Mary is there {n}. ", "question": WHERE, "target": "kitchen", "more": n} for n in range(3)]


@pytest.mark.parametrize(
    "name", ["1k/qa1.json", "1k/qa1.jsonl", "data/qa1/1k.json", "qa1/1k.jsonl", "data/1k/qa1.json"]
)
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_layouts(name, lines, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    if lines or path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    else:
        path.write_text(json.dumps(ROWS, indent=1))
    files = find_samples(tmp_path, "qa1", "1k")
    assert files == [path]
    assert read_samples(files)[2] == Sample("Mary is there 2.", WHERE, "kitchen")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed (lm-eval brings it)")
def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for part in range(2):
        path = tmp_path / "0k" / f"qa1-0000{part}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    samples = read_samples(find_samples(tmp_path, "qa1", "0k"))
    assert samples[5] == Sample("Mary is there 2.", WHERE, "kitchen") and len(samples) == 6
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"qa1-00001-of-00002\.parquet: cannot be read as parquet"):
        read_samples(find_samples(tmp_path, "qa1", "0k"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "0k").mkdir()
    (tmp_path / "0k" / "qa1-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_samples(find_samples(tmp_path, "qa1", "0k"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no samples; the file is empty"),
        ("[]", "no samples; the file is empty"),
        ("{", "is neither a JSON list nor JSON lines"),
        ('[{"input": "a", "target": "b"}]', "row 0: column 'question' is missing; its columns are 'input', 'target'"),
        ('{"input": "a", "question": "b", "target": 3}', "row 0: column 'target' holds int; expected text"),
        ("[3]", "row 0: holds int; expected an object"),
    ],
)
def test_damaged_samples(content, said, tmp_path):
    path = tmp_path / "qa1.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_samples([path])
    assert said in str(error.value) and str(path) in str(error.value)
