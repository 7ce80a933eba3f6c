"""What a user can get wrong ends in exit code 2 and one message that says what, where and what would be right."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import own_lines

from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.config import parse_config, save_config
from lm2_jax.train import main

ROOT = Path(__file__).parents[1]

SMALL = """
model: {d_model: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, d_ff: 16}
memory: {num_slots: 2, num_heads: 2}
train: {run_dir: run, steps: 2}
optim: {warmup_steps: 0}
"""
TEXT = ("tokenizer.kind=bytes", "data={source: text, path: text.txt, batch_size: 8, segment_length: 8}")


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Runs `train` in an empty directory with some files; gives the message of its exit with code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "text.txt").write_text("One line.\nAnother line.\n")

    def run(*overrides, config="small.yaml"):
        arguments = [argument for override in overrides for argument in ("--set", override)]
        monkeypatch.setattr(sys, "argv", ["train", "--config", config, *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert message.startswith("error: ") and message.count("error: ") == 1 and "Traceback" not in message
        assert not Path("run").exists(), "a run directory is made before the mistake is found"
        return message

    return run


def write_shard(name, tokens, magic=20240801, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 7, len(tokens) if count is None else count
    Path(name).write_bytes(header.tobytes() + np.array(tokens, "<u4").tobytes())


# --- The config file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: {d_modle: 64}", "bad.yaml: model.d_modle: unknown key; did you mean 'd_model'?"),
        ("train: {steps: many}", "bad.yaml: train.steps: found 'many'; should be a valid integer"),
        ("model: {d_model: 64, num_heads: 6}", "bad.yaml: model.num_heads 6 does not divide d_model 64"),
        ("data: {source: text}", "bad.yaml: data.path is missing"),
        ("data: {document_separator: '('}", "bad.yaml: data.document_separator '(' is not a regular expression"),
        ("model: {d_model: [", "bad.yaml: line 1 is not valid YAML"),
        ("- model\n- data", "bad.yaml: holds list; expected sections"),
        (b"\x80\x81", "bad.yaml: cannot be read as a text file"),
        (None, "bad.yaml: no such config file"),
    ],
)
def test_config_file(fails, content, said):
    if content is not None:
        Path("bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in fails(config="bad.yaml")


def test_config_file_that_is_a_directory(fails):
    Path("configs").mkdir()
    assert "configs: cannot be read as a text file ([Errno 21] Is a directory" in fails(config="configs")


def test_all_mistakes_are_listed_each_with_its_origin(fails):
    message = fails("train.steps=-1", "memory.kind=lstm", "steps=3")
    assert [line.split(":")[0] for line in message.removeprefix("error: ").splitlines()] == [
        "--set memory.kind",
        "--set train.steps",
        "--set steps",
    ]


# --- Data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.txt", "data.path: missing.txt does not exist"),
        ("'*.md'", "data.path: *.md matches no file"),
        ("empty.txt", "data.path: no documents; all files are empty: empty.txt"),
        ("white.txt", "data.path: no documents; all files are empty: white.txt"),
        ("folder", "data.path: folder is a directory; name files in it, for example folder/*.txt"),
        ("binary.txt", "binary.txt: not UTF-8 text, byte 1 is 0xff"),
    ],
)
def test_text_files(fails, path, said):
    Path("empty.txt").touch()
    Path("white.txt").write_text(" \n\n")
    Path("binary.txt").write_bytes(b"a\xff")
    Path("folder").mkdir()
    assert said in fails(*TEXT, f"data.path={path}")


def test_json_lines(fails):
    Path("bad.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    assert "bad.jsonl: line 2: has no 'text'; its keys are 'txt'" in fails(
        *TEXT, "data.source=jsonl", "data.path=bad.jsonl"
    )


def test_validation_leaves_nothing_to_train_on(fails):
    message = fails(*TEXT)
    assert "data.validation_fraction 0.05 holds out 1 of 1 documents" in message
    assert "data.document_separator" in message and "data.validation_path" in message


def test_validation_files(fails):
    assert "data.validation_path: no.txt does not exist" in fails(*TEXT, "data.validation_path=no.txt")


def test_shards(fails):
    write_shard("magic.bin", [1, 2], magic=7)
    write_shard("short.bin", [1, 2], count=9)
    write_shard("large.bin", [1, 50])
    Path("tiny.bin").write_bytes(b"abc")
    message = fails("data={source: bin, path: '*.bin'}", "model.vocab_size=50")
    for said in (
        "magic.bin: magic 7, version 7; expected 20240801, 7",
        "short.bin: 1032 bytes, but its header promises 9 tokens, that is 1060 bytes; the file is cut short",
        "large.bin: token 1 is id 50, outside of a vocabulary of 50",
        "tiny.bin: ends inside its header",
    ):
        assert said in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.segment_length=2"], "data.segment_length: 8 tokens are too few for a story of qa1 with one question"),
        (
            ["train.curriculum=[{segments: 1, segment_length: 64, steps: 1}, {segments: 1, segment_length: 6}]"],
            "6 tokens are too few for a story of qa1",
        ),
        (["eval.lengths=[2, 1]", "data.segment_length=6"], "6 tokens are too few for a story of qa1"),
        (["data.path=text.txt"], "text.txt: line 1: found 'One line.'; a bAbI line is a number"),
        (
            ["data.background=text.txt", "tokenizer.kind=bytes"],
            "data.background: text.txt has 24 characters but no sentence of 10 words",
        ),
        (["data.background=text.txt"], "data.background needs bytes, sentencepiece, tokenizers or llama3"),
        (["data.validation_path=text.txt"], "data.validation_path without data.path"),
        (["data.path=qa15.txt"], "does not know every word of 'Mice are afraid of wolves.'"),
        (["eval.path=missing.txt"], "eval.path: missing.txt does not exist"),
        (["eval.path=text.txt"], "text.txt: line 1: found 'One line.'; a bAbI line is a number"),
        (["eval.path=text.txt", "eval.lengths=[0]"], "text.txt: line 1: found 'One line.'"),
        (["eval.path=qa15.txt"], "does not know every word of 'Mice are afraid of wolves.'"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_stories_that_cannot_be_told_are_found_before_training(fails, overrides, said):
    Path("qa15.txt").write_text("1 Mice are afraid of wolves.\n2 What are mice afraid of?\twolf\n")
    assert said in fails(*overrides)


# --- Tokenizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "llama3"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.model", "tokenizer.path: missing.model cannot be read (No such file or directory)"),
        ("text.txt", "tokenizer.path: text.txt is not a {kind} model: "),
        ("empty.model", "tokenizer.path: empty.model is not a {kind} model: "),
    ],
)
def test_tokenizer_files(fails, kind, path, said):
    Path("empty.model").touch()
    message = fails(*TEXT, f"tokenizer={{kind: {kind}, path: {path}}}")
    assert said.format(kind=kind) in message
    assert ".cc(" not in message  # a line of C++ is no help


def test_fewer_rows_than_the_tokenizer_has_ids(fails):
    message = fails(*TEXT, "model.vocab_size=200")
    assert "model.vocab_size: found 200, but the tokenizer (bytes) has 258 ids; set it to 258, to null or," in message


# --- Run directory and devices -------------------------------------------------------------------------------------


def test_run_directory_of_another_config(fails):
    Path("other").mkdir()
    before = parse_config(SMALL, ["model.vocab_size=185", "train.seed=7", "model.d_ff=32", "train.steps=9"])
    save_config(before, "other/config.yaml")
    saved = Path("other/config.yaml").read_text()
    assert fails("train.run_dir=other").splitlines() == [
        "error: other holds a run of another config; give this one another train.run_dir, or undo:",
        "  model.d_ff: 32 in the run directory, 16 now",
        "  train.seed: 7 in the run directory, 0 now",
        "What may change between runs: train.run_dir, train.steps, train.max_skipped_steps, train.trackers, "
        "train.profile, data.prefetch, data.cache_gb, checkpoint, eval, mesh",
    ]
    assert Path("other/config.yaml").read_text() == saved


def test_run_directory_that_is_a_file(fails):
    assert "train.run_dir: text.txt cannot be created (File exists)" in fails("train.run_dir=text.txt")
    assert "train.run_dir: text.txt/run cannot be created" in fails("train.run_dir=text.txt/run")


def test_checkpoint_directory_that_is_a_file(fails):
    Path("other").mkdir()
    Path("other/checkpoints").write_text("")
    assert "other/checkpoints is no directory to save checkpoints in (File exists)" in fails("train.run_dir=other")


def test_run_directory_in_use(fails):
    Path("other").mkdir()
    with Path("other/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "other: another process trains in it" in fails("train.run_dir=other")


def test_run_directory_with_a_broken_config(fails):
    Path("broken").mkdir()
    Path("broken/config.yaml").write_text("model: {d_modle: 3}")
    assert "broken/config.yaml: model.d_modle: unknown key" in fails("train.run_dir=broken")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.batch_size=12", "data.batch_size 12 with optim.accumulation_steps 1: 12 lanes do not divide over"),
        (
            "mesh={data: 16, fsdp: 1}",
            "mesh: data 16 x fsdp 1 x context 1 x tensor 1 does not make up 8 devices; set one axis to",
        ),
        ("mesh={data: 2, fsdp: 2}", "mesh: data 2 x fsdp 2 x context 1 x tensor 1 does not make up 8 devices"),
    ],
)
def test_mesh(fails, override, said):
    assert said in fails(override)


# --- The command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.yaml: b: found 1"), 2, "error: a.yaml: b: found 1\n"),
        (TrainingFailed("20 steps in a row"), 1, "error: 20 steps in a row\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(capsys, error, code, said):
    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(command)
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def train_process(*arguments):
    """`python -m lm2_jax.train` as a user runs it."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "lm2_jax.train", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_help():
    done = train_process("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "--config FILE" in done.stdout and "--set KEY=VALUE" in done.stdout


def test_no_config_given():
    done = train_process()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith("error: one of the arguments --config --verify is required")


def test_a_mistake_seen_from_the_shell():
    done = train_process("--config", "configs/babilong_tiny.yaml", "--set", "model.d_modle=64")
    assert (done.returncode, done.stdout) == (2, "")
    assert own_lines(done.stderr) == "error: --set model.d_modle: unknown key; did you mean 'd_model'?\n"
