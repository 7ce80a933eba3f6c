"""Every parser, with few inputs. `python tests/faults/fuzz.py --inputs 100000` is the campaign."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_parsers import PARSERS

INPUTS = 40


def test_parsers_take_any_input_or_refuse_it():
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "--inputs", str(INPUTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert re.findall(rf"^(\w+): {INPUTS} inputs", done.stdout, re.MULTILINE) == list(PARSERS)


_BROKEN = """
import os, fuzz, fuzz_parser
def read(directory, value): {}
fuzz.SECONDS, fuzz.PARSERS = 1, {{"x": fuzz_parser.Parser(lambda random: b"", read)}}
fuzz.main()
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("1 // 0", "ZeroDivisionError"),
        ("os.abort()", "exit code -6"),
        ("bytearray(2 << 30)", "MemoryError"),
        ("all(True for _ in iter(int, 1))", "took more than 1 s"),
    ],
)
def test_a_parser_that_breaks_its_promise_is_found(what, said):
    command = [sys.executable, "-c", _BROKEN.format(what)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr
