"""Opening what is to be prepared: files and data sets of the Hugging Face hub, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm2_jax.common.errors import UserError
from lm2_jax.data.paths import expand_paths
from lm2_jax.data.prepare.chunks import Input, require
from lm2_jax.data.prepare.files import BinInput, JsonLinesInput, TextInput
from lm2_jax.data.prepare.tables import HUB_ID, ParquetInput, open_hub

_ENDINGS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet", ".bin", ".gz", ".zst")


def open_inputs(
    names: Sequence[str],
    *,
    field: str,
    separator: str | None,
    split: str,
    vocab_size: int,
    bos_id: int | None,
) -> list[Input]:
    """Opens inputs by name: files and globs, sorted, then hub ids: `owner/name`, optionally with `@revision` and
    `:config`.

    Endings tell how a file is read: .jsonl, .ndjson, .json (lines of objects), .parquet, .bin (the official layout);
    all others are text. .gz or .zst may follow, except after .parquet and .bin.

    Args:
      field: the key or column that holds the text.
      separator: of text files, as in `documents.TextSource`.
      split: of hub data sets.
      vocab_size: ids of .bin files must be below it.
      bos_id: the id that documents of .bin files begin with.

    Raises UserError for a name that matches nothing, and if a package that an input needs is not installed.
    """
    hub = [name for name in names if _is_hub_id(name)]
    patterns = [name for name in names if name not in hub]
    inputs: list[Input] = []
    for path in expand_paths(patterns, "--input") if patterns else ():
        suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
        packed = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else None
        kind = suffixes[-1] if suffixes else ""
        if packed and kind in (".parquet", ".bin"):
            raise UserError(f"{path}: unpack it first; {kind} files are read in place")
        if packed == ".zst":
            require("pyarrow", f"{path}: zstd")
        if kind in (".jsonl", ".ndjson", ".json"):
            inputs.append(JsonLinesInput(path, field))
        elif kind == ".parquet":
            require("pyarrow.parquet", f"{path}: parquet")
            inputs.append(ParquetInput(path, field))
        elif kind == ".bin":
            if bos_id is None:
                raise UserError(f"{path}: documents begin with a begin token, which --tokenizer does not have")
            inputs.append(BinInput(path, vocab_size, bos_id))
        else:
            inputs.append(TextInput(path, separator))
    return inputs + [open_hub(name, split, field) for name in hub]


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists() and Path(name).suffix.lower() not in _ENDINGS
