"""Every command answers --help at once, with examples, and mistakes before it imports what takes seconds."""

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from helpers import interruptible

from lm2_jax import evaluate
from lm2_jax.common.command_line import EVALUATION_TASKS

ROOT = Path(__file__).parents[1]
_FILES = [path for folder in ("lm2_jax", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
COMMANDS = [
    f"tools/{path.name}" if path.parent.name == "tools" else ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in _FILES
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]

# Runs commands by their names with some arguments; prints what each wrote, how it ended, and the slow imports so far.
_RUN = """
import contextlib, io, json, runpy, sys
sys.path.append("tools")  # as for a script in it
arguments, *commands = json.loads(sys.argv[1])
told = {}
for command in commands:
    sys.argv, written, code = [command, *arguments], io.StringIO(), 0
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        try:
            (runpy.run_path if command.endswith(".py") else runpy.run_module)(command, run_name="__main__")
        except SystemExit as end:
            code = end.code
    slow = sorted({"jax", "flax", "torch", "matplotlib"} & set(sys.modules))
    told[command] = [written.getvalue(), code, slow]
print(json.dumps(told))
"""


def run_all(*arguments):
    """What every command does with these arguments, in one process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _RUN, json.dumps([arguments, *COMMANDS])],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


def test_help():
    told = run_all("--help")
    assert {"lm2_jax.train", "lm2_jax.convert_checkpoint", "tools/inspect_memory.py"} <= set(told)
    for command, (text, code, slow) in told.items():
        assert code == 0, command
        if command.startswith("lm2_jax"):
            assert text.count(f"python -m {command}") > 1, f"{command}: no example"
        assert not slow, f"{command} --help imports {slow}"


def test_tools_are_the_commands():
    """Each file of tools/ is one of them, by its old name."""
    told = run_all("--help")
    texts = {command: text for command, (text, _, _) in told.items()}
    tools = [command for command in texts if command.startswith("tools/")]
    assert len(tools) == 12 and {texts[tool] for tool in tools} <= {texts[c] for c in texts if c not in tools}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(script, monkeypatch, capsys):
    """A command that is called by its script's name says so."""
    monkeypatch.setattr(sys, "argv", [f"/bin/{script}", "--help"])
    with pytest.raises(SystemExit) as end:
        pkgutil.resolve_name(SCRIPTS[script])()
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith(f"usage: {script} ")
    assert f"\n  {script} " in said.split("examples:")[1] and "python -m" not in said


def test_every_command_is_a_script():
    modules = {value.removesuffix(":command") for value in SCRIPTS.values()}
    assert modules == {name for name in COMMANDS if name.startswith("lm2_jax.") and "measurements" not in name}


def test_mistakes_come_before_slow_imports():
    for command, (text, code, slow) in run_all("--no-such-flag").items():
        assert code == 2 and "usage: " in text and not slow, command


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "aot", "bench"])
def test_ctrl_c_during_imports_leaves_no_traceback(command):
    arguments = {
        "train": ["--config", "x"],
        "evaluate": ["--checkpoint", "x", "--task", "babilong"],
        "generate": ["--checkpoint", "x", "--prompt", "x"],
        "aot": ["--config", "x", "--topology", "v5e:1x1"],
        "bench": ["--config", "x"],
    }[command]
    line = interruptible([sys.executable, "-m", f"lm2_jax.{command}", *arguments])
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    *warned, last = said.splitlines()
    assert last.startswith("interrupted") and all("warning: libtpu" in line for line in warned), said


@pytest.mark.parametrize("name", EVALUATION_TASKS)
def test_tasks_are_those_of_the_command_line(name):
    task = evaluate.import_task(name)
    assert task.__name__ == f"lm2_jax.evals.{name}"
    assert all(callable(function) for function in (task.evaluate, task.tables, task.draw))
