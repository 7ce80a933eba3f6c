"""bAbI v1.2 stories as data: read from files, split by a hash, one BABILong sample per question."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator

from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath, to_path


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    """A sentence that tells something: "Mary moved to the bathroom."."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer: "Where is Mary?" and "bathroom"."""

    text: str
    answer: str


Line = Statement | Question
Story = tuple[Line, ...]
_HELD_OUT_SHARE = 8  # one story in so many is held out


def read_babi(path: str | AnyPath) -> list[Story]:
    """Reads the stories of one bAbI file, with their questions.

    Lines are `ID text`, questions `ID text<tab>answer<tab>supports` (some copies have | for the tabs); IDs count
    from 1, and 1 begins a story.

    Raises UserError, with the file and the line, for a file that is missing, empty or not UTF-8, a line without a
    number or out of order, and a question without an answer.
    """
    path = to_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; a bAbI file is plain text") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a bAbI file such as qa1_*_train.txt"
        ) from None
    stories: list[list[Line]] = []
    for number, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        where = f"{path}: line {number}: found {content[:60]!r}; "
        position, _, rest = content.strip().partition(" ")
        if not (re.fullmatch("[0-9]{1,9}", position) and rest):
            raise UserError(where + "a bAbI line is a number, a space and a sentence: '1 Mary went to the kitchen.'")
        if int(position) == 1:
            stories.append([])
        expected = len(stories[-1]) + 1 if stories else 1
        if int(position) != expected:
            raise UserError(where + f"the number should be {expected}, or 1 where a story begins")
        stories[-1].append(_parse_line(rest, where))
    if not stories:
        raise UserError(f"{path}: is empty; expected bAbI lines such as '1 Mary went to the kitchen.'")
    return [tuple(story) for story in stories]


def question_samples(story: Story) -> Iterator[Story]:
    """Yields one story per question: the statements before it, then that question (BABILong, arXiv 2406.10149)."""
    statements: list[Line] = []
    for line in story:
        if isinstance(line, Question):
            yield (*statements, line)
        else:
            statements.append(line)


def is_held_out(story: Story) -> bool:
    """True for the held-out eighth of all stories: by a stable hash of the statements, whatever is asked."""
    text = " ".join(line.text for line in story if isinstance(line, Statement))
    return zlib.crc32(text.encode()) % _HELD_OUT_SHARE == 0


def _parse_line(text: str, where: str) -> Line:
    sentence, *fields = (field.strip() for field in re.split(r"[\t|]", text))
    if not fields and "?" not in sentence:
        return Statement(sentence)
    if not (sentence and fields and fields[0]):
        raise UserError(where + "a question is followed by a tab and its answer: '3 Where is Mary?<tab>kitchen<tab>1'")
    return Question(sentence, fields[0])
