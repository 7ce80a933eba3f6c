"""The command `generate`: prompts, memory files and mistakes, as a user meets them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, own_lines, quick_training, run_generate, tiny_config

from lm2_jax.config import save_config
from lm2_jax.decoding import sampling
from lm2_jax.decoding.memory_file import save_state
from lm2_jax.training.loop import train

T, V = 8, 50


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A tiny trained model of stories."""
    path = tmp_path_factory.mktemp("generate") / "run"
    with quick_training():
        train(tiny_config(path, "train.steps=2", "train.curriculum=[]", "data.segments_per_window=1"))
    return path


@pytest.fixture
def command(run_dir, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty directory; gives its exit code and what it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, checkpoint=run_dir):
        return run_generate(monkeypatch, capsys, checkpoint, *arguments)

    return run


PROMPT = "Mary went to the kitchen. John went to the garden. Where is Mary?"


def talk(command, *arguments):
    """The first draw that is not over at once: the options of it, and what was said."""
    for seed in range(20):
        options = ("--temperature", "1", "--seed", str(seed), "--max-new-tokens", "9")
        code, out, err = command(*arguments, *options)
        assert (code, err) == (0, "")
        if len(out.split()) > 4:
            return options, out
    raise AssertionError("twenty times nothing")


def test_command_reads_once_and_answers_often(command):
    """A prompt file into memory, then questions to it: what one long prompt would have given."""
    Path("story.txt").write_text(f"{PROMPT} {PROMPT}")
    saved = command("--prompt-file", "story.txt", "--max-new-tokens", "0", "--save-memory", "m.safetensors")
    assert saved == (0, "", "m.safetensors: memory after 33 tokens\n")
    for question in ("Where is John?", "Where is Mary?"):
        options, out = talk(command, "--load-memory", "m.safetensors", "--prompt", question)
        assert command("--prompt", f"{PROMPT} {PROMPT} {question}", *options) == (0, out, "")
        assert command("--prompt", question, *options) != (0, out, "")


def test_command_stops_at_a_string(command):
    options, out = talk(command, "--prompt", PROMPT)
    word = out.split()[3]
    code, stopped, _ = command("--prompt", PROMPT, *options, "--stop", f" {word}", "--stop", "no such words")
    assert (code, stopped) == (0, out[: out.index(f" {word}")] + "\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", " "], "the prompt holds no token"),
        (["--prompt-file", "missing.txt"], "--prompt-file: missing.txt cannot be read (No such file or directory)"),
        (["--prompt-file", "binary.txt"], "--prompt-file: binary.txt is not UTF-8 text (byte 1)"),
        (["--prompt-file", "empty.txt"], "--prompt-file: empty.txt is empty"),
        (["--prompt", "a", "--top-p", "0"], "top_p: found 0.0; give a probability above 0"),
        (["--prompt", "a", "--load-memory", "binary.txt"], "binary.txt: cannot be read as a memory file"),
        (["--prompt", "a", "--save-memory", "no/m.safetensors"], "--save-memory: the directory of no/m.safetensors"),
        (["--prompt", "a", "--checkpoint", "missing"], "missing: no such directory; give a run directory"),
        (["--prompt", "a", "--prompt-file", "b"], "argument --prompt-file: not allowed with argument --prompt"),
        (["--prompt", "a", "--stop", ""], "argument --stop: an empty string occurs everywhere"),
        ([], "one of the arguments --prompt --prompt-file --prompts is required"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes(command, arguments, said):
    Path("binary.txt").write_bytes(b"a\xff")
    Path("empty.txt").touch()
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert said in err and err.count("error: ") == 1 and "Traceback" not in err


def test_memory_of_many_rows(command, run_dir):
    from lm2_jax import load

    model, params = load(run_dir)
    save_state("two.safetensors", model, params, sampling.start(model, params, 2))
    assert command("--prompt", "a", "--load-memory", "two.safetensors") == (
        2,
        "",
        "error: --load-memory: two.safetensors holds 2 rows; expected one\n",
    )


def test_token_ids_without_a_tokenizer(command, run_dir, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "checkpoints").symlink_to(run_dir / "checkpoints")
    config = tiny_config("bin", "data.source=bin", "data.path=a.bin", "model.vocab_size=185", "train.curriculum=[]")
    save_config(config, tmp_path / "bin" / "config.yaml")
    code, _, err = command("--prompt", "a", checkpoint="bin")
    assert code == 2 and err.startswith("error: bin: trained on token ids (data.source bin), and its config names no")


def test_seen_from_the_shell(command, run_dir):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "4")
    done = subprocess.run(
        [sys.executable, "-m", "lm2_jax.generate", "--checkpoint", str(run_dir), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, own_lines(done.stderr)) == command(*arguments)


def test_a_file_of_prompts_is_answered_line_by_line(command):
    """What each line gives alone, whichever rows it shares; mistakes are named by their line."""
    lines = [PROMPT, f"{PROMPT} {PROMPT}", "John went to the garden. Where is John?"]
    Path("prompts.txt").write_text("\n".join(lines) + "\n")
    options = ("--temperature", "1", "--max-new-tokens", "5")
    code, out, err = command("--prompts", "prompts.txt", "--rows", "2", *options)
    assert (code, err) == (0, "")
    found = {answer["line"]: answer["text"] for answer in map(json.loads, out.splitlines())}
    alone = [command("--prompt", line, "--seed", str(seed), *options)[1] for seed, line in enumerate(lines)]
    assert found == {number: text.removesuffix("\n") for number, text in enumerate(alone, 1)}
    for empty in ("", "  "):
        Path("prompts.txt").write_text(f"{PROMPT}\x0c\u2028\n{empty}\n{PROMPT}\n", encoding="utf-8")
        code, _, err = command("--prompts", "prompts.txt")
        assert code == 2
        assert "line 2 is empty" in err
    code, _, err = command("--prompts", "")
    assert code == 2
    assert "--prompts:  cannot be read" in err or "--prompts: . cannot be read" in err
    code, _, err = command("--prompt", PROMPT, "--rows", "2")
    assert code == 2
    assert err.endswith("argument --rows: only with --prompts\n")
