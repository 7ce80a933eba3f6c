"""The files that settings name."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from lm2_jax.common.errors import UserError


def expand_paths(paths: Sequence[str | Path], key: str) -> list[Path]:
    """Lists the files that paths and globs (`**` matches any depth of directories) name, each once, sorted.

    Raises UserError, naming the setting `key`, for every path that leads to no file and for directories.
    """
    files: set[Path] = set()
    problems = []
    for path in map(str, paths):
        if Path(path).is_file():
            files.add(Path(path))
        elif Path(path).is_dir():
            problems.append(f"{key}: {path} is a directory; name files in it, for example {Path(path) / '*.txt'}")
        elif found := [file for file in map(Path, glob.iglob(path, recursive=True)) if file.is_file()]:
            files.update(found)
        else:
            problems.append(f"{key}: {path} " + ("matches no file" if glob.has_magic(path) else "does not exist"))
    if problems or not files:
        raise UserError("\n".join(problems) or f"{key}: no files given")
    return sorted(files)
