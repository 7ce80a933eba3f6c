"""lm-evaluation-harness's tasks on our models: MMLU, against its own model too, and any task by name."""

import csv
import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from evaluated import load, make_checkpoint, make_model, needs_harness, score
from helpers import on_one_device, random_checkpoint

from lm2_jax.common.errors import UserError, run_command
from lm2_jax.evals import harness, mmlu, scoring
from lm2_jax.evaluate import main
from lm2_jax.parallel.mesh import use_mesh


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes the directory of a model of a kind, once."""
    return functools.partial(make_checkpoint, tmp_path_factory.mktemp("models"))


# --- MMLU ----------------------------------------------------------------------------------------------------------

SUBJECTS = {"high_school_geography": 30, "marketing": 22}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A directory of made-up questions, as MMLU has them."""
    folder, rng = tmp_path_factory.mktemp("mmlu"), np.random.default_rng(0)
    words = ("river", "1/400", 'the "inner" core, and the outer', "19", "a market", "none of these", "price", "")
    for split, lengths in (("dev", dict.fromkeys(SUBJECTS, 5)), ("test", SUBJECTS)):
        (folder / split).mkdir()
        for subject, count in lengths.items():
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                for number in range(count):
                    question = f" Which is the {number}th\nof {' and '.join(rng.choice(words, 2))}? "
                    writer.writerow([question, *rng.choice(words, 4), rng.integers(4)])
    return folder


def measure(checkpoint, *overrides, output=None, task=mmlu):
    loaded = load(checkpoint, *overrides)
    with use_mesh(loaded.mesh):
        return task.evaluate(loaded, output, lambda _: None)


def test_questions_are_read_to_the_letter(questions):
    first, *_ = mmlu.read_questions(questions / "test" / "marketing_test.csv")
    assert first["question"].startswith(" Which is the 0th\nof ") and first["question"].endswith("? ")
    found = {choice for q in mmlu.read_questions(questions / "dev" / "marketing_dev.csv") for choice in q["choices"]}
    assert {"1/400", "19", "", 'the "inner" core, and the outer'} <= found
    assert first["answer"] in range(4) and len(first["choices"]) == 4


@needs_harness
@pytest.mark.parametrize("shots", [0, 5])
def test_prompts_and_choices(questions, checkpoint, shots, monkeypatch):
    """What is asked, and that the likeliest letter is the choice."""
    seen = {}

    def likes_b(loaded, pairs):
        for context, continuation in pairs:
            seen.setdefault(loaded.tokenizer.decode(context), []).append(loaded.tokenizer.decode(continuation))
        yield [(i, -float(loaded.tokenizer.decode(c) != " B"), False) for i, (_, c) in enumerate(pairs)]

    monkeypatch.setattr(scoring, "loglikelihood", likes_b)
    result = measure(checkpoint("lm2"), f"eval.mmlu={{path: {questions}, shots: {shots}}}")
    every = {s: mmlu.read_questions(questions / "test" / f"{s}_test.csv") for s in SUBJECTS}
    right = {s: [q["answer"] == 1 for q in asked] for s, asked in every.items()}
    assert {row["task"]: (row["value"], row["samples"], row["shots"]) for row in result["scores"]} == {
        "mmlu": (pytest.approx(np.mean([*right["high_school_geography"], *right["marketing"]])), 52, shots),
        **{s: (pytest.approx(np.mean(found)), len(found), shots) for s, found in right.items()},
    }

    def block(q, answer=""):
        lines = [q["question"].strip(), *(f"{x}. {c}" for x, c in zip("ABCD", q["choices"], strict=True))]
        return "\n".join([*lines, f"Answer:{answer}"])

    expected = set()
    for subject, asked in every.items():
        solved = mmlu.read_questions(questions / "dev" / f"{subject}_dev.csv")[:shots]
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        head += "".join(block(q, f" {'ABCD'[q['answer']]}\n\n") for q in solved)
        expected |= {head + block(q) for q in asked}
    assert set(seen) == expected
    assert all(choices == [" A", " B", " C", " D"] for choices in seen.values())


@needs_harness
def test_the_definition_is_the_harness_own(questions):
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    own = yaml.safe_load((folder / "_default_template_yaml").read_text())
    own |= yaml.safe_load((folder / "mmlu_high_school_geography.yaml").read_text())
    ours = mmlu._task(questions, "high_school_geography", 5)
    source = {"dataset_path", "dataset_name", "custom_dataset", "include", "tag", "task", "task_alias", "metadata"}
    assert {k: v for k, v in ours.items() if k not in source} == {k: v for k, v in own.items() if k not in source}


@needs_harness
@pytest.mark.parametrize("shots", [0, 5])
def test_equals_the_harness_own_model(questions, shots, tmp_path):
    """A converted Llama against the harness's hf model of the original: every log-likelihood of 52 questions."""
    for library in ("torch", "transformers", "accelerate"):
        pytest.importorskip(library, reason=f"{library} is not installed (requirements-dev.txt)")
    import lm_eval
    from convert_helpers import convert
    from lm_eval.models.huggingface import HFLM

    write_llama(tmp_path / "llama", questions / "test" / "marketing_test.csv")
    where = convert("huggingface", "lm2_jax", tmp_path / "llama", tmp_path / "ours", "data.segment_length=1024")
    theirs = HFLM(pretrained=str(tmp_path / "llama"), device="cpu", batch_size=16, dtype="float32")
    with on_one_device():
        loaded = load(where, "data.batch_size=16", f"eval.mmlu={{path: {questions}, shots: {shots}}}")
    found = []
    for model in (make_model(loaded), theirs):
        tasks = harness._load("mmlu", [mmlu._group(questions, loaded.config.eval.mmlu)], None)
        for task in tasks["tasks"].values():
            harness._set_shots(task, shots)
        with use_mesh(loaded.mesh):
            result = lm_eval.evaluate(model, tasks, bootstrap_iters=0)
        samples = [sample for task in SUBJECTS for sample in result["samples"][task]]
        answers = np.array([answer for sample in samples for answer in sample["filtered_resps"]])
        found.append((answers, [sample["acc"] for sample in samples]))
    (ours, our_right), (hf, hf_right) = found
    assert ours.shape == (52 * 4, 2) and np.ptp(hf[:, 0]) > 1
    np.testing.assert_allclose(ours, hf, rtol=0, atol=1e-3)
    assert our_right == hf_right and 0 < sum(hf_right) < 52


def write_llama(path, text):
    """A random Llama with a tokenizer of the text that puts a begin token first, as a Hugging Face directory."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer, alphabet = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        path
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=1024,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


# --- Any task by name ----------------------------------------------------------------------------------------------

TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} Where?",
        "doc_to_choice": ["garden", "office"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    },
    "own_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
    "own_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A directory of task files over a JSON file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": f"Mary went to the garden {n} times.", "label": n % 2} for n in range(7)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, "test_split": "test", **task}))
    return folder


@needs_harness
def test_tasks_by_name(own_tasks, checkpoint):
    settings = f"eval.harness={{tasks: [{', '.join(TASKS)}], include: {own_tasks}, limit: 6}}"
    result = measure(checkpoint("lm2"), settings, task=harness)
    scores = {row["task"]: row for row in result["scores"]}
    assert {name: (row["metric"], row["samples"], row["shots"]) for name, row in scores.items()} == {
        "own_choice": ("acc", 6, 0),
        "own_text": ("exact_match", 6, 0),
        "own_perplexity": ("byte_perplexity", 6, 0),
    }
    loaded = load(checkpoint("lm2"))
    rows = [f"Mary went to the garden {n} times." for n in range(6)]
    log = sum(log for log, _ in score(loaded, [([256], loaded.tokenizer.encode(text)) for text in rows]))
    assert scores["own_perplexity"]["value"] == pytest.approx(np.exp(-log / len("".join(rows))), rel=1e-4)


# --- The command ---------------------------------------------------------------------------------------------------


@needs_harness
def test_command_and_what_is_finished(questions, checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    arguments = ["evaluate", "--checkpoint", str(checkpoint("lm2")), "--task", "mmlu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--set", f"eval.mmlu={{path: {questions}, shots: 0, limit: 6}}"])
    run_command(main)
    result, said = json.loads(output.read_text()), capsys.readouterr()
    assert "loglikelihood: 48/48 answered" in said.out and f"{result['scores'][0]['value']:.4f}" in said.out
    assert "WARNING" not in said.err
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    finished = output.with_suffix(".finished.jsonl")
    lines = finished.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 48
    finished.write_text("".join(lines[:21]) + lines[21][:30])  # killed in the middle of a line
    read, texts_read = scoring._read, []

    def count(loaded, step, memory, batch):
        texts_read.extend(batch)
        return read(loaded, step, memory, batch)

    monkeypatch.setattr(scoring, "_read", count)
    run_command(main)
    again = json.loads(output.read_text())
    assert again == result and len(texts_read) == 7  # 28 choices
    monkeypatch.setattr(scoring, "_read", None)
    run_command(main)
    assert json.loads(output.read_text()) == result


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("eval.mmlu={path: nowhere}", "eval.mmlu.path: nowhere holds no test/*_test.csv"),
        ("eval.mmlu={path: own, subjects: physics}", "own/test/physics_test.csv: cannot be read (No such file"),
        ("eval.mmlu={path: own, subjects: lacking}", "lacking_test.csv: column 'choice3' is missing; the first line"),
        ("eval.mmlu={path: own, subjects: letters}", "letters_test.csv: line 3: answer: found 'B'; should be 0, 1, 2"),
        (
            "eval.mmlu={path: own, subjects: short}",
            "short_test.csv: line 2: should have as many fields as the first line, 6",
        ),
        ("eval.mmlu={path: own, subjects: latin}", "latin_test.csv: is not a UTF-8 csv file"),
        ("eval.mmlu={path: own, subjects: empty}", "empty_test.csv: contains no questions"),
        (
            "eval.mmlu={path: own, subjects: good, shots: 2}",
            "eval.mmlu.shots: found 2, but own/dev/good_dev.csv holds 1",
        ),
        ("eval.mmlu={path: own, shots: -1}", "eval.mmlu.shots: found -1; should be greater than or equal to 0"),
        ("eval.mmlu={subjects: astronomi}", "has no task 'mmlu_astronomi'; did you mean mmlu_astronomy"),
        ("eval.harness={limit: 3}", "eval.harness.tasks is missing: name tasks"),
        ("eval.harness={tasks: hella}", "eval.harness: lm-evaluation-harness has no task 'hella'; "),
        ("eval.harness={tasks: hellaswag, include: nowhere}", "eval.harness.include: nowhere is no directory"),
        ("eval.harness={tasks: broken, include: own}", "eval.harness: cannot load broken ("),
    ],
)
@needs_harness
def test_errors(settings, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    head = "question,choice0,choice1,choice2,choice3,answer\n"
    contents = {
        "lacking": head.replace(",choice3", "") + "a,b,c,d,0\n",
        "letters": head + "a,b,c,d,e,0\na,b,c,d,e,B\n",
        "short": head + "a,b,c,d,0\n",
        "latin": head + "n\xe9e,b,c,d,e,0\n",
        "empty": head,
        "good": head + "a,b,c,d,e,0\n",
    }
    for split in ("dev", "test"):
        (tmp_path / "own" / split).mkdir(parents=True)
        for name, text in contents.items():
            (tmp_path / "own" / split / f"{name}_{split}.csv").write_text(text, encoding="latin-1")
    broken = {"task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": "nowhere.jsonl"}}
    Path("own/broken.yaml").write_text(
        yaml.safe_dump({**broken, "test_split": "train", "output_type": "generate_until"})
    )
    fails(checkpoint, settings, said, monkeypatch, capsys)


def fails(checkpoint, settings, said, monkeypatch, capsys):
    task = settings.split(".")[1].split("=")[0]
    arguments = ["--checkpoint", str(checkpoint("lm2")), "--task", task, "--set", "eval.mmlu.shots=0"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--set", settings])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith("error: ") and said in message and "Traceback" not in message


@needs_harness
def test_the_generators_words_are_no_text(tmp_path):
    words = ("tokenizer.kind=stories", "model.vocab_size=185", "data.batch_size=8")
    with pytest.raises(UserError, match="knows only the generator's words"):
        measure(random_checkpoint(tmp_path / "model", *words), "eval.harness.tasks=own", task=harness)


@pytest.mark.parametrize("task", ["mmlu", "harness"])
def test_without_the_harness(task, checkpoint, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    fails(
        checkpoint,
        f"eval.{task}={{{'path' if task == 'mmlu' else 'tasks'}: a}}",
        "pip install 'lm-eval",
        monkeypatch,
        capsys,
    )
