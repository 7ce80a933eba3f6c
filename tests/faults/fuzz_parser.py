"""What is fuzzed: a parser of what others may have written, and how its inputs are made."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hostile import mutated


@dataclasses.dataclass(frozen=True)
class Parser:
    """Something that reads what a stranger wrote.

    Attributes:
      make: an input.
      read: reads one, with a directory for its files.
      prepare: makes what all inputs share in that directory.
    """

    make: Callable[[Random], Any]
    read: Callable[[Path, Any], None]
    prepare: Callable[[Path], None] = lambda directory: None


def bytes_like(*seeds, words=()):
    return lambda random: mutated(random, random.choice(seeds), words)


def in_file(name, read):
    """A parser's `read` for inputs that are the bytes of one file."""

    def write_and_read(directory, data):
        path = directory / name
        path.write_bytes(data)
        read(path)

    return write_and_read


class Directory:
    """Inputs that are one changed file of a sound directory.

    write: makes the directory. read: reads it. changes: file name -> makes its bytes of random choices and sound ones.
    """

    def __init__(self, write, read, changes):
        self._write, self._read, self._changes = write, read, changes

    def prepare(self, directory):
        self._write(directory)
        self._sound = {name: (directory / name).read_bytes() for name in self._changes}
        self._read(directory)

    def make(self, random):
        name = random.choice(list(self._sound))
        return name, self._changes[name](random, self._sound[name])

    def read(self, directory, value):
        name, data = value
        (directory / name).write_bytes(data)
        try:
            self._read(directory)
        finally:
            (directory / name).write_bytes(self._sound[name])

    def parser(self):
        return Parser(self.make, self.read, self.prepare)
