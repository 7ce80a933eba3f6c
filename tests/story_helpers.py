"""Short forms of bAbI stories for tests."""

from pathlib import Path

import pytest

from lm2_jax.data.babi.files import Question, Statement
from lm2_jax.tokenizer import StoriesTokenizer

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
PLACES = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
BABI = Path(__file__).parents[2] / "shared" / "data" / "babi"
REAL_FILES = [*sorted(BABI.glob("en-10k/qa[1245]_*.txt")), *sorted(BABI.glob("en/qa[13]_*.txt"))]
needs_babi = pytest.mark.skipif(not REAL_FILES, reason=f"no bAbI files in {BABI}")
TOKENIZER = StoriesTokenizer()


def words(text):
    return text.replace("?", " ?").replace(".", " .").split()


def story_of(*texts):
    return tuple(Question(*text) if isinstance(text, tuple) else Statement(text) for text in texts)


def statements(story):
    return [line.text for line in story if isinstance(line, Statement)]


def contains_in_order(text, parts):
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
