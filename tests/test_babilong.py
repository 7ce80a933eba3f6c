"""BABILong: the metric case by case, prompts, and answers as each prompt alone would get."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import on_one_device, random_checkpoint

from lm2_jax.common.errors import UserError, run_command
from lm2_jax.config import parse_config
from lm2_jax.data.babi.babilong import (
    BuiltSamples,
    Sample,
    generated_questions,
    parse_length,
)
from lm2_jax.data.babi.files import Question, read_babi
from lm2_jax.data.babi.sources import QuestionSource
from lm2_jax.decoding.sampling import generate
from lm2_jax.evals import babilong
from lm2_jax.evals.babilong import is_correct
from lm2_jax.evals.babilong_prompts import TASKS, official_prompt
from lm2_jax.evals.model import load_for_evaluation
from lm2_jax.evaluate import main
from lm2_jax.parallel.mesh import use_mesh

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_babi = pytest.mark.skipif(not (SHARED / "babi").is_dir(), reason="the bAbI files are not on this machine")
needs_books = pytest.mark.skipif(not (SHARED / "books").is_dir(), reason="the books are not on this machine")

# --- The metric ----------------------------------------------------------------------------------------------------

WHERE, BEFORE = "Where is Mary?", "Where was the apple before the office?"
CARRYING = "What is Mary carrying?"

CASES = [
    # (task, question, target, output, right, why)
    ("qa1", WHERE, "kitchen", "kitchen", True, "the label alone"),
    ("qa1", WHERE, "kitchen", "Kitchen", True, "case does not count"),
    ("qa1", WHERE, "kitchen", "KITCHEN.", True, "neither does a full stop"),
    ("qa1", WHERE, "Kitchen", "kitchen", True, "the target is lower-cased, too"),
    ("qa1", WHERE, "kitchen", " the kitchen", True, "a label inside a phrase"),
    ("qa1", WHERE, "kitchen", "Mary is in the kitchen", True, "a label inside a sentence"),
    ("qa1", WHERE, "kitchen", "\n\nkitchen\n", True, "line breaks around it"),
    ("qa1", WHERE, "kitchen", "'kitchen'!", True, "other marks around it"),
    ("qa1", WHERE, "kitchen", "kitchens", True, "labels are looked for as substrings"),
    ("qa1", WHERE, "kitchen", "kitchen kitchen kitchen", True, "named again it is still one label"),
    ("qa1", WHERE, "kitchen", "garden", False, "another label"),
    ("qa1", WHERE, "kitchen", "", False, "nothing is no answer"),
    ("qa1", WHERE, "kitchen", "I do not know", False, "no label"),
    ("qa1", WHERE, "kitchen", "kit chen", False, "the label is cut in two"),
    ("qa1", WHERE, "kitchen", "kitchen or garden", False, "two labels"),
    ("qa1", WHERE, "kitchen", "kitchen, garden", False, "a list where one is asked for"),
    ("qa1", WHERE, "kitchen", "not the garden but the kitchen", False, "two labels, whatever stands between"),
    ("qa1", WHERE, "kitchen", "kitchen. garden", True, "only the first sentence counts"),
    ("qa1", WHERE, "kitchen", "garden. kitchen", False, "only the first sentence counts"),
    ("qa1", WHERE, "kitchen", ". kitchen", False, "the first sentence is empty"),
    ("qa1", WHERE, "kitchen", "...kitchen", False, "the first full stop ends it"),
    ("qa1", WHERE, "kitchen", "kitchen\ngarden", False, "a line's end is no sentence's end"),
    ("qa1", WHERE, "kitchen", "kitchen! garden", False, "neither is an exclamation mark"),
    ("qa1", WHERE, "kitchen", "kitchen <context> garden", True, "what follows an echoed context is cut"),
    ("qa1", WHERE, "kitchen", "kitchen <CONTEXT> garden", True, "in capitals, too: it is lower-cased first"),
    ("qa1", WHERE, "kitchen", "<context> kitchen", False, "nothing is left before the echo"),
    ("qa1", WHERE, "kitchen", "kitchen</context> garden", False, "the closing tag cuts nothing"),
    ("qa1", WHERE, "kitchen", "kitchen\n<example>\ngarden", True, "what follows an invented example is cut"),
    ("qa1", WHERE, "kitchen", "<example> kitchen", False, "nothing is left before the example"),
    ("qa1", WHERE, "kitchen", "kitchen <example> garden <context> office", True, "the earliest of the marks counts"),
    ("qa3", BEFORE, "kitchen", "kitchen, before the office", True, "labels of the question do not count"),
    ("qa3", BEFORE, "kitchen", "office", False, "a label of the question alone is none"),
    ("qa3", BEFORE, "kitchen", "kitchen, not garden, before the office", False, "two are left"),
    ("qa3", BEFORE.upper(), "kitchen", "kitchen, before the office", True, "labels in a question in capitals"),
    ("qa4", "What is north of the kitchen?", "office", "the office is north of the kitchen", True, "a full sentence"),
    ("qa4", "What is north of the kitchen?", "kitchen", "kitchen", False, "a target in the question is never met"),
    ("qa5", "Who gave the milk?", "Bill", "bill", True, "names are lower-cased like all else"),
    ("qa5", "Who gave the milk?", "Bill", "Bill gave the milk to someone", True, "milk is in the question"),
    ("qa5", "Who gave the milk?", "Bill", "Bill gave it to Mary", False, "two names"),
    ("qa6", "Is Mary in the office?", "no", "No, she is in the garden", True, "rooms are no labels of this task"),
    ("qa6", "Is Mary in the office?", "yes", "yes, she is", True, "a word of agreement"),
    ("qa6", "Is Mary in the office?", "yes", "yes, I know", False, "know holds no, which is a label"),
    ("qa6", "Is Mary in the office?", "no", "nobody can say", True, "a substring is enough"),
    ("qa7", "How many objects is Mary carrying?", "two", "two objects", True, "a number in words"),
    ("qa7", "How many objects is Mary carrying?", "two", "2", False, "figures are no labels"),
    ("qa7", "How many objects is Mary carrying?", "one", "one", True, "none is not in it"),
    ("qa7", "How many objects is Mary carrying?", "none", "none", False, "none holds one: two labels, as officially"),
    ("qa8", CARRYING, "apple", "apple", True, "a list of one"),
    ("qa8", CARRYING, "nothing", "nothing at all", True, "the empty hand is a label"),
    ("qa8", CARRYING, "apple,milk", "apple,milk", True, "a list"),
    ("qa8", CARRYING, "apple,milk", "milk and apple", True, "in any order, however they are joined"),
    ("qa8", CARRYING, "apple,milk", "apple", False, "one is missing"),
    ("qa8", CARRYING, "apple,milk", "apple, milk and football", False, "one is too many"),
    ("qa8", CARRYING, "apple,milk", "apple, football", False, "as many, but others"),
    ("qa8", CARRYING, "apple,milk", "apple. milk", False, "the second is beyond the first sentence"),
    ("qa8", CARRYING, "apple", "apple,milk", False, "a list where one is right"),
    ("qa8", CARRYING, "football,apple,milk", "an apple, some milk, a football", True, "a list of three"),
    ("qa10", "Is Bill in the office?", "maybe", "maybe", True, "a third answer"),
    ("qa10", "Is Bill in the office?", "maybe", "maybe yes", False, "two answers"),
    ("qa15", "What is gertrude afraid of?", "wolf", "wolf", True, "beyond qa10"),
    ("qa15", "What is gertrude afraid of?", "wolf", "wolves", False, "the plural does not hold the singular"),
    ("qa19", "How do you go from the kitchen to the garden?", "s,e", "s,e", True, "three characters are no list"),
    ("qa19", "How do you go from the kitchen to the garden?", "s,e", "e,s", False, "a path has an order"),
    ("qa19", "How do you go from the kitchen to the garden?", "s,e", "s, e", False, "nor does it have a space"),
    ("qa20", "Why did sumit go to the bedroom?", "tired", "tired, so the bedroom", True, "the room is in the question"),
]


@pytest.mark.parametrize(("task", "question", "target", "output", "right", "why"), CASES, ids=[c[5] for c in CASES])
def test_metric(task, question, target, output, right, why):
    assert is_correct(output, target, question, TASKS[task].labels) is right, why


@needs_babi
@pytest.mark.parametrize("task", TASKS)
def test_every_true_answer_of_babi_is_right(task):
    """So labels are complete, and no target stands in its question; but for none, which the metric never accepts."""
    path = next(path for folder in ("en-10k", "en") for path in (SHARED / "babi" / folder).glob(f"{task}_*train.txt"))
    questions = {line for story in read_babi(path) for line in story if isinstance(line, Question)}
    wrong = {q.answer for q in questions if not is_correct(q.answer, q.answer, q.text, TASKS[task].labels)}
    assert wrong == ({"none"} if task == "qa7" else set())
    assert {part.lower() for q in questions for part in ([q.answer] if task == "qa19" else q.answer.split(","))} == {
        label.lower() for label in TASKS[task].labels
    }


# --- Prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_official_prompt(task):
    text, sample = TASKS[task], Sample("Some context.", "Some question?", "label")
    parts = official_prompt(sample, task).split("\n\n")
    assert parts[0].endswith(text.instruction)
    assert parts[1].startswith("<example>") and parts[1].endswith("</example>")
    assert parts[2:] == [text.post_prompt, "<context>\nSome context.\n</context>", "Question: Some question?"]
    for _, question, answer in text.examples:
        assert is_correct(answer, answer, question, text.labels)


def test_the_plain_prompt_is_what_stories_train_on():
    config = parse_config("", ["tokenizer.kind=stories", "eval.babilong.prompt=plain"])
    tokenizer = babilong.load_tokenizer(config.tokenizer)
    source = QuestionSource(config.data, tokenizer, budget=None, seed=0, count=5)
    for document in source:
        answer = int(np.flatnonzero(document.answers)[0])
        text = tokenizer.decode(document.tokens[:answer])
        context, question = text[: text.rindex(".") + 1], text[text.rindex(".") + 2 :]
        prompt = babilong.encode_prompt(Sample(context, question, ""), "qa1", config.eval.babilong, tokenizer)
        np.testing.assert_array_equal(prompt, document.tokens[:answer])


# --- The command ---------------------------------------------------------------------------------------------------

ROWS = [{"input": f" Mary is there {n}. ", "question": WHERE, "target": "kitchen", "more": n} for n in range(3)]
STORIES = ("tokenizer.kind=stories", "model.vocab_size=185", "data.batch_size=8", "data.segment_length=32")
ASK = ("eval.babilong={tasks: [qa1, qa5], lengths: [0k, 1k], samples: 5, prompt: plain, max_new_tokens: 4}",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("stories") / "model", *STORIES)


def ask(checkpoint, *overrides, output=None):
    loaded = load_for_evaluation(checkpoint, (*ASK, *overrides))
    with use_mesh(loaded.mesh):
        return loaded, babilong.evaluate(loaded, output, lambda _: None)


def records(output):
    return [json.loads(line) for line in output.with_suffix(".finished.jsonl").read_text().splitlines()[1:]]


def test_answers_are_those_of_each_prompt_alone(checkpoint, tmp_path):
    with on_one_device():
        loaded, result = ask(checkpoint, output=tmp_path / "one.json")
    found = records(tmp_path / "one.json")
    assert [(r["task"], r["length"], r["index"]) for r in found] == [
        (task, length, index) for length in ("0k", "1k") for task in ("qa1", "qa5") for index in range(5)
    ]
    tokenizer, stories = loaded.tokenizer, loaded.config.data.stories
    for record in found[::3]:
        questions = generated_questions(record["task"], stories, seed=0, count=5)
        length, seed = parse_length(record["length"]), (0, int(record["task"][2:]))
        sample = BuiltSamples(questions, length, tokenizer, None, seed, 5)[record["index"]]
        prompt = [tokenizer.special.bos_id, *tokenizer.encode(f"{sample.context} {sample.question}")]
        assert len(prompt) == record["prompt_tokens"] and (record["target"], record["question"]) == (
            sample.target,
            sample.question,
        )
        (alone,) = generate(
            loaded.model, loaded.params, [prompt], max_new_tokens=4, stop_ids=[tokenizer.special.eos_id]
        )
        assert record["output"] == tokenizer.decode(alone).partition(".")[0]
    for cell in result["cells"]:
        own = [r for r in found if (r["task"], r["length"]) == (cell["task"], cell["length"])]
        assert cell["asked"] == len(own) == 5
        assert cell["correct"] == sum(r["correct"] for r in own)
        assert 0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1
    assert result["mean_qa1_qa5"] == {}

    _, sharded = ask(checkpoint, output=tmp_path / "eight.json")  # over eight devices
    assert [r["output"] for r in records(tmp_path / "eight.json")] == [r["output"] for r in found]
    assert sharded["cells"] == result["cells"]


def test_finished_samples_are_not_asked_again(checkpoint, tmp_path, monkeypatch):
    asked = []

    def generate_until(loaded, prompts, rows, max_new_tokens, stops):
        asked.extend(prompts)
        return ["garden"] * len(prompts)

    monkeypatch.setattr(babilong, "generate_until", generate_until)
    output = tmp_path / "result.json"
    _, expected = ask(checkpoint, output=output)
    assert len(asked) == 20
    finished = output.with_suffix(".finished.jsonl")
    lines = finished.read_text().splitlines(keepends=True)
    finished.write_text("".join(lines[:9]) + lines[9][:30])  # killed in the middle of a line
    asked.clear()
    assert ask(checkpoint, output=output)[1] == expected
    assert len(asked) == 12
    asked.clear()
    _, more = ask(checkpoint, "eval.babilong.samples=6", "eval.babilong.tasks=[qa1]", output=output)
    assert len(asked) == 2 and [cell["asked"] for cell in more["cells"]] == [6, 6]
    with pytest.raises(UserError, match=r"samples of another evaluation \(max_new_tokens: 4 there, 5 now\)"):
        ask(checkpoint, "eval.babilong.max_new_tokens=5", output=output)


def test_the_leaderboards_mean(checkpoint, monkeypatch):
    monkeypatch.setattr(babilong, "generate_until", lambda loaded, prompts, *_, stops: ["garden"] * len(prompts))
    _, result = ask(checkpoint, "eval.babilong.tasks=[qa5, qa4, qa3, qa2, qa1]", "eval.babilong.lengths=[0k]")
    assert result["mean_qa1_qa5"] == {"0k": pytest.approx(np.mean([c["accuracy"] for c in result["cells"]]))}


def test_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(babilong, "generate_until", lambda loaded, prompts, *_, stops: ["garden"] * len(prompts))
    folder = tmp_path / "hub" / "data" / "qa1"
    folder.mkdir(parents=True)
    for length in ("0k", "2k"):
        (folder / f"{length}.json").write_text(json.dumps([{**ROWS[0], "target": "garden"}, ROWS[0]]))
    output = tmp_path / "result.json"
    settings = f"eval.babilong={{path: {tmp_path}/hub, tasks: qa1, lengths: [2k, 0k], prompt: plain}}"
    arguments = ["--checkpoint", str(checkpoint), "--task", "babilong", "--set", settings, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--set", "tokenizer.kind=bytes"])
    run_command(main)
    result, said = json.loads(output.read_text()), capsys.readouterr().out
    assert [(c["length"], c["asked"], c["accuracy"]) for c in result["cells"]] == [("0k", 2, 0.5), ("2k", 2, 0.5)]
    assert "50% (9%-91%)" in said and "2/2 answered" in said
    for picture in (".heatmap.png", ".lengths.png"):
        assert output.with_suffix(picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("eval.babilong.tasks=[qa1, qa21]",), "eval.babilong.tasks.1: found 'qa21'; should be 'qa1', 'qa2'"),
        (("eval.babilong.lengths=[0k, 1000]",), "eval.babilong.lengths.1: found 1000; should be a valid string"),
        (("eval.babilong.lengths=4K",), "lengths: found '4K'; write 0k, 4k, 128k or 1M"),
        (("eval.babilong.tasks=[qa1, qa2, qa1]",), "tasks: qa1 appears twice"),
        (("eval.babilong={path: hub, books: a.txt}",), "leave out babi and books"),
        (("eval.babilong.path=nowhere",), "eval.babilong.path: nowhere is no directory"),
        (("eval.babilong={path: empty, tasks: qa1}",), "empty holds no 0k/qa1.json or .parquet"),
        (("eval.babilong.babi=empty",), "eval.babilong.babi: empty holds no qa1_*.txt"),
        (("eval.babilong.tasks=qa6",), "eval.babilong.babi is missing: the generator makes qa1"),
        (("eval.babilong.books=empty.txt",), "eval.babilong.books: empty.txt is empty"),
        (("eval.babilong.books=latin.txt",), "latin.txt cannot be read as a UTF-8 text file"),
        (("eval.babilong={books: short.txt, lengths: [0k, 1M]}", "tokenizer.kind=bytes"), "of 1,000,000; name more"),
        (("eval.babilong.prompt=official",), "does not know every word of the prompts"),
    ],
)
def test_errors(overrides, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"n\xe9e")
    Path("short.txt").write_text("This is a sentence of some length. " * 50)
    arguments = [argument for override in overrides for argument in ("--set", override)]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--task", "babilong", "--checkpoint", str(checkpoint), *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith("error: ") and said in message and "Traceback" not in message
