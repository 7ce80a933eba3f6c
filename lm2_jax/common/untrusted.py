"""Guards against hostile input: sizes of files, names that lead out of a directory, values too long to print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath

_LONGEST_SHOWN = 200
LONGEST_JSON = 1 << 24  # bytes of a header, an index or a config, which become some 30 times as many when read


def read_limited(path: AnyPath, most: int) -> bytes:
    """The bytes of a file. Raises UserError if there are more than `most`, OSError if it cannot be read."""
    data = bytearray()
    with path.open("rb") as file:
        while part := file.read(1 << 20):  # not `most` at once, which would allocate that much
            data += part
            if len(data) > most:
                raise UserError(f"{path}: is longer than {most:,} bytes, the most that such a file may have")
    return bytes(data)


def resolve_inside(directory: Path, name: str) -> Path:
    """The file of a directory that an entry in one of its files names.

    A link may lead to another file of the directory, or out of a snapshot of the Hugging Face hub's cache into its
    `blobs`. Raises UserError for paths instead of names, for links to elsewhere, and if there is no such file.
    """
    is_name = name.isprintable() and name not in ("", "..") and Path(name).name == name
    if not is_name:
        raise UserError(f"{directory}: {short_repr(name)} is not the name of a file here")
    path = directory / name
    try:
        is_file, home, real = path.is_file(), directory.resolve(), path.resolve()
    except OSError as error:
        raise UserError(f"{directory}: {short_repr(name)} cannot be read ({error.strerror})") from None
    if not is_file:
        raise UserError(f"{path}: is missing, or not a plain file")
    blobs = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (home, *blobs)):
        raise UserError(f"{path}: links to a file outside its directory; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError if it is missing, a link to elsewhere, too long, or holds none."""
    try:
        values = json.loads(read_limited(resolve_inside(path.parent, path.name), LONGEST_JSON).decode())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}; expected an object, {{...}}")
    return values


def short_repr(value: Any) -> str:
    """`repr` of a value for a message, shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        text = f"{type(value).__name__} that is too large to show"
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
