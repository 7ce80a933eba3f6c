"""The house rules that can be checked: imports run one way, memory kinds stay in their place, ruff is content."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lm2_jax.model import KINDS

ROOT = Path(__file__).parents[1]
PACKAGE = "lm2_jax"
SHIPPED_CONFIGS = f"{PACKAGE}.config.shipped"  # of configs/, once it is installed


def _module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


EXPORTED = ROOT / PACKAGE / "convert" / "huggingface_model"  # PyTorch code that is copied, and not imported here
OURS = [path for path in sorted((ROOT / PACKAGE).rglob("*.py")) if path.parent != EXPORTED]
MODULES = {_module_name(path): ast.parse(path.read_text("utf-8")) for path in OURS}
TOOLS = {path.name: ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "tools").glob("*.py"))}


def imported(tree):
    """What a module imports, wherever in the file: (module, name or None), names that are modules resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write {PACKAGE}..."
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full, None) if full in MODULES else (node.module, alias.name)


IMPORTS = {name: {module for module, _ in imported(tree)} for name, tree in MODULES.items()}
SIBLINGS = {name: {module for module in modules if module in MODULES} for name, modules in IMPORTS.items()}


def part(module):
    """The file or the package below lm2_jax: "lm2_jax.data.lanes" is of "data"; "" is lm2_jax itself."""
    return [*module.split("."), ""][1]


def reachable(module):
    found, waiting = set(), [module]
    while waiting:
        for other in SIBLINGS[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


# --- Imports -------------------------------------------------------------------------------------------------------

COMMANDS = {
    *("train", "evaluate", "generate", "aot", "bench", "convert_checkpoint", "prepare_data", "train_tokenizer"),
    *("plot_run", "inspect_memory", "inspect_answers", "reproduce_babilong", "reproduce_adopt"),
}
BASE = {"common", "config"}
RUNNING = {"parallel", "model", "segments"}

# What a room may import besides itself: rooms above it in this table, so that imports run one way.
MAY_IMPORT = {
    "common": set(),
    "config": {"common"},
    "tokenizer": BASE,
    "batch": set(),
    "data": BASE | {"tokenizer", "batch"},
    "parallel": BASE | {"batch"},
    "model": BASE | {"parallel", "batch"},
    "segments": BASE | {"parallel", "model", "batch"},
    "convert": BASE | {"model", "tokenizer"},
    "checkpoint": BASE | {"parallel"},
    "loading": BASE | {"tokenizer", "parallel", "model", "convert", "checkpoint"},
    "decoding": BASE | {"parallel", "model", "tokenizer", "checkpoint"},
    "plots": BASE,
    "training": BASE | RUNNING | {"batch", "tokenizer", "data", "checkpoint", "loading", "plots"},
    "evals": BASE | RUNNING | {"batch", "tokenizer", "data", "convert", "checkpoint", "loading", "decoding", "plots"},
    "inspection": BASE | RUNNING | {"batch", "tokenizer", "data", "loading", "decoding", "plots", "evals"},
    "compiled": BASE | RUNNING | {"batch", "tokenizer", "decoding", "training"},
    "measurements": BASE | RUNNING | {"batch", "tokenizer", "data", "loading", "decoding", "training"},
    "study": BASE | {"tokenizer", "model", "convert"},
}


def test_the_table_runs_one_way():
    rooms = list(MAY_IMPORT)
    assert all(rooms.index(other) < rooms.index(room) for room, others in MAY_IMPORT.items() for other in others)
    assert set(rooms) == {part(module) for module in MODULES} - COMMANDS - {""}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module):
    here = part(module)
    others = {part(other) for other in SIBLINGS[module]} - {here}
    assert "" not in others, f"{module} imports {PACKAGE} itself, which imports everything"
    if here in COMMANDS or not here:
        return
    assert not others & COMMANDS, f"{module} imports a command"
    assert others <= MAY_IMPORT.get(here, set()), f"{module} imports {sorted(others - MAY_IMPORT[here])}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself_in_a_circle(module):
    assert module not in reachable(module)


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in BASE | {"batch", "data", "tokenizer"}])
def test_settings_and_data_do_without_jax(module):
    for name in (module, *reachable(module)):
        libraries = {other.split(".")[0] for other in IMPORTS[name]}
        allowed = {"grain"} if part(name) == "data" else set()
        found = libraries & {"jax", "flax", "optax", "orbax", "chex", "tensorstore", "grain"} - allowed
        assert not found, f"{module}, by way of {name}, imports {found}"


@pytest.mark.parametrize(("module", "tree"), [*MODULES.items(), *TOOLS.items()], ids=[*MODULES, *TOOLS])
def test_private_names_stay_private(module, tree):
    ours = {name for name, _ in imported(tree) if name.split(".")[0] == PACKAGE}
    private = [name for name, what in imported(tree) if name in ours and what and re.match(r"_(?!_)", what)]
    assert not private, f"{module} imports a private name of {private}"
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.name in MODULES or f"{getattr(node, 'module', None)}.{alias.name}" in MODULES
    }
    reached_for = [
        f"{ast.unparse(node)}, line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and ast.unparse(node.value) in aliases
    ]
    assert not reached_for, f"{module} uses {reached_for}"


# --- Memory kinds --------------------------------------------------------------------------------------------------


def _asks_for_a_kind(node):
    """Whether a comparison, a match, an isinstance or a table asks which memory kind it has."""
    if isinstance(node, ast.Compare | ast.Match):
        subject = node.left if isinstance(node, ast.Compare) else node.subject
        cases = node.comparators if isinstance(node, ast.Compare) else [case.pattern for case in node.cases]
        strings = {
            constant.value
            for tree in (subject, *cases)
            for constant in ast.walk(tree)
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        }
        about_memory = re.search(r"\bkind\b", " ".join(map(ast.unparse, (subject, *cases))))
        return bool(strings & {"lm2", "rmt"} or (about_memory and strings & {"official", "none", *KINDS}))
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        classes = {kind.__name__ for kind in KINDS.values()} - {"MemoryKind"}
        return any(isinstance(name, ast.Name) and name.id in classes for name in ast.walk(node.args[1]))
    keys = node.keys if isinstance(node, ast.Dict) else []
    return any(isinstance(key, ast.Constant) and key.value in ("lm2", "rmt") for key in keys)


def _kind_questions(tree):
    return [f"line {node.lineno}: {ast.unparse(node)[:80]}" for node in ast.walk(tree) if _asks_for_a_kind(node)]


# settings know the kinds by name; the benchmark and the study compare them
MAY_NAME_KINDS = {f"{PACKAGE}.{module}" for module in ("config.spec", "model", "compiled.comparisons", "bench")}
MAY_NAME_KINDS |= {module for module in MODULES if part(module) == "study"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_NAME_KINDS))
def test_nobody_asks_which_memory_it_is(module):
    assert not _kind_questions(MODULES[module])


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ("config.memory.kind == 'lm2'", True),
        ("'rmt' != kind", True),
        ("memory.kind in ('none', 'official')", True),
        ("match memory.kind:\n  case 'official': pass", True),
        ("isinstance(kind, (LM2, int))", True),
        ("{'rmt': 1}[config.memory.kind]", True),
        ("source == 'official'", False),
        ("remat == 'none'", False),
        ("tokenizer.kind == 'bytes'", False),
    ],
)
def test_the_question_is_recognised(code, asks):
    assert bool(_kind_questions(ast.parse(code))) == asks


# --- Files ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_asks_for_docstrings_and_types():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert {"D1", "ANN", "E", "F", "I"} <= set(settings["select"])
    assert not {"D100", "D101", "D102", "D103", "ANN001", "ANN201"} & set(settings["ignore"])
    assert all(files.startswith("tests/") for files in settings["per-file-ignores"])


def _tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_paths_of_one_machine():
    anywhere = re.compile(rb"(?<![\w.])/(?:work/|tmp/venv|root\b|home/\w)")
    files = _tracked_files()
    assert ROOT / "pyproject.toml" in files
    found = {}
    for path in files:
        if path != Path(__file__) and (match := anywhere.search(path.read_bytes())):
            found[str(path.relative_to(ROOT))] = match.group().decode()
    assert not found


def test_ci_runs_the_readme_command():
    commands = re.findall(r"^```bash\n(.*?)\n```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert (ROOT / ".ci" / "run").read_text("utf-8").splitlines()[-1] == commands[1]


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_every_package_is_installed():
    """A directory of modules that pyproject.toml does not name would be missing from an installed lm2_jax."""
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    directories = {path.parent for path in _tracked_files() if path.suffix == ".py" and PACKAGE in path.parts}
    inside = {".".join(path.relative_to(ROOT).parts) for path in directories if path.is_relative_to(ROOT / PACKAGE)}
    assert inside | {SHIPPED_CONFIGS} == packages
