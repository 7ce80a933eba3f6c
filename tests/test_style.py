"""The house rules about sizes and words: short files, functions and signatures; docstrings and names that say it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lm2_jax"
EXPORTED = ROOT / PACKAGE / "convert" / "huggingface_model"  # transformers dictates signatures
CODE = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
    for folder in (PACKAGE, "tools", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PRODUCT = {path: tree for path, tree in CODE.items() if not path.startswith("tests/")}
SIZED = {path: tree for path, tree in CODE.items() if EXPORTED not in (ROOT / path).parents}

# --- Sizes ---------------------------------------------------------------------------------------------------------

MAX_FILE, MAX_COMMAND, MAX_FUNCTION, MAX_PARAMETERS, MAX_FILES_ON_TOP = 400, 140, 70, 7, 3
MAY_TAKE_MORE = {"run_segments": "other people's scripts rely on its signature"}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function):
    """Names of a function's or a lambda's parameters, self and cls left out."""
    a = function.args
    listed = (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)
    return [one.arg for one in listed if one and one.arg not in ("self", "cls")]


def test_files_are_short():
    lengths = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path in CODE}
    found = [f"{path} has {length} lines" for path, length in lengths.items() if length > MAX_FILE]
    assert not found, "\n".join(found)


def test_functions_are_short():
    found = [
        f"{path}, line {node.lineno}: {node.name} has {lines} lines"
        for path, tree in SIZED.items()
        for node in functions(tree)
        if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION
    ]
    assert not found, "\n".join(found)


def test_parameter_lists_are_short():
    found = [
        f"{path}, line {node.lineno}: {node.name} has {len(parameters(node))} parameters"
        for path, tree in SIZED.items()
        for node in functions(tree)
        if len(parameters(node)) > MAX_PARAMETERS and node.name not in MAY_TAKE_MORE
    ]
    assert not found, "\n".join(found)


def test_few_files_lie_on_top():
    """Besides commands, which are thin: their work lies in rooms."""
    sources = {path.name: path.read_text("utf-8") for path in (ROOT / PACKAGE).glob("*.py")}
    commands = {name: source for name, source in sources.items() if "\ncommand = " in source}
    assert len(sources.keys() - commands.keys() - {"__init__.py"}) <= MAX_FILES_ON_TOP, sorted(sources)
    found = {name: lines for name, source in commands.items() if (lines := source.count("\n")) > MAX_COMMAND}
    assert not found


# --- Words ---------------------------------------------------------------------------------------------------------


def test_docstrings_make_sense_alone():
    """A docstring's first line is a sentence or a noun phrase, and not the end of a sentence begun by the name."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        f"{path}, line {node.body[0].lineno}: {docstring.splitlines()[0]}"
        for path, tree in PRODUCT.items()
        for node in ast.walk(tree)
        if isinstance(node, documented) and (docstring := ast.get_docstring(node))
        if re.match(r"(Of|As|What|Whether|Where|Which)\b", docstring)
    ]
    assert not found, "\n".join(found)


# The field's term: names that must not stand for it. A function or a method alone where its name is an everyday noun.
TERMS = {
    "attention weights": "shares attention_shares shares_BHTN",
    "intermediates": "LOOKS",
    "key/value cache": "Past past _past place_BST places put",
    "decode state": "Unfinished begin extend finish derive readable",
    "before_blocks, after_blocks": "enter leave",
    "shards": "parts fetch on_own_lanes _on_own_lanes splits_lanes LANES constrain",
    "vocabulary chunks": "pieces columns numbers",
    "document ids": "groups_BT groups_BU",
    "bank_before, write_base, tanh_bank, from_update, from_bank": "found_BNM from_BNM held_BNM told_BNM kept_BNM",
    "is_causal, supports_layer_schedule, shares_one_bank": "token_by_token layer_by_layer bank_passes_through",
    "select_lanes": "choose_lanes",
    "as_slots": "method:slots",
    "EvalModel, ResultLog": "Loaded Finished",
    "generate_until, loglikelihood": "function:answer function:score",
    "log, settings": "say _say ask",
    "SegmentTrace, MemoryTrace": "Look Reading",
    "comparisons, variants, Program": "races entrants Runner",
    "resolve_inside, short_repr, read_limited": "beside shown read_small",
    "flatten_dict, unflatten_dict": "by_path as_tree",
}
BETTER = {name: term for term, names in TERMS.items() for name in names.split()}
MAY_BE_NAMED = {"readable": "a method of io.RawIOBase"}  # name: why it may be


def _definitions(tree):
    """(line, name, its kinds) of everything that a module defines but local variables."""
    methods = {id(node) for owner in ast.walk(tree) if isinstance(owner, ast.ClassDef) for node in owner.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.lineno, node.name, [""]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name, ["", "function:", *["method:"] * (id(node) in methods)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from ((node.lineno, name, [""]) for name in parameters(node))
        if isinstance(node, ast.Module | ast.ClassDef):
            assigned = [statement for statement in node.body if isinstance(statement, ast.Assign | ast.AnnAssign)]
            names = [name for statement in assigned for name in ast.walk(statement) if isinstance(name, ast.Name)]
            yield from ((name.lineno, name.id, [""]) for name in names if isinstance(name.ctx, ast.Store))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.lineno, node.attr, [""]


def _private_words(tree):
    return [
        f"line {line}: {name} (the field's term: {BETTER[kind + name]})"
        for line, name, kinds in _definitions(tree)
        for kind in kinds
        if kind + name in BETTER and name not in MAY_BE_NAMED
    ]


def test_names_are_the_fields_own():
    package = {path: tree for path, tree in PRODUCT.items() if path.startswith(f"{PACKAGE}/")}
    found = [f"{path}, {name}" for path, tree in package.items() for name in _private_words(tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "private"),
    [
        ("class Past: pass", True),
        ("class A:\n  shares: int", True),
        ("class A:\n  past = 1", True),
        ("class A:\n  def slots(self): pass", True),
        ("class A:\n  def a(self): self.parts = 1", True),
        ("def a(*, places): pass", True),
        ("a = lambda put: put", True),
        ("LANES, B = 1, 2", True),
        ("def answer(): pass", True),
        ("def _on_own_lanes(): pass", True),
        ("class A:\n  answer: int", False),
        ("def slots(): pass", False),
        ("def a():\n  numbers = 1", False),
        ("a = numbers", False),
        ("a.parts = 1", False),
    ],
)
def test_private_words_are_recognised(code, private):
    assert bool(_private_words(ast.parse(code))) == private
