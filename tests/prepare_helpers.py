"""Files to prepare, in every format, and what becomes of them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from lm2_jax.config import TokenizerConfig
from lm2_jax.data.prepare.inputs import open_inputs
from lm2_jax.data.prepare.shards import Settings
from lm2_jax.data.prepared import PreparedSource
from lm2_jax.tokenizer import BytesTokenizer

ROOT = Path(__file__).parents[1]
BYTES = BytesTokenizer()
TEXTS = ["one", "two \u00e9\u65e5", "  ", "three\nlines\nlong", "", "four " * 40, "five"]
WRITTEN = [text for text in TEXTS if text.strip()]


def inputs_of(names, **changes):
    options = {"field": "text", "separator": None, "split": "train", "vocab_size": 258, "bos_id": 256} | changes
    return open_inputs([str(name) for name in names], **options)


def settings_of(output, **changes):
    return Settings(**{"tokenizer": TokenizerConfig(kind="bytes"), "output": output} | changes)


def texts_in(output):
    return [BYTES.decode(document.tokens) for document in PreparedSource([output], BYTES.fingerprint())]


def files_in(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def json_lines(texts, key="text"):
    return "".join(json.dumps({"id": 7, key: text}) + "\n" for text in texts).encode()


def table(texts, delimiter=",", column="text"):
    """CSV or TSV as Python writes it; a text that spans lines or holds the delimiter is quoted."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["id", column, "note"])
    writer.writerows([7, text, 'a "note", quoted'] for text in texts)
    return file.getvalue().encode()


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(texts, column="text", kind=None):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, kind)})
    pyarrow.parquet.write_table(table, sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


def bin_shard(*documents):
    ids = np.concatenate([[256, *text.encode()] for text in documents]).astype("<u4")
    return np.array([20240801, 7, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes()


def write(path, data):
    path.write_bytes(data)
    return path
