"""Tables to prepare, with texts in one column: parquet files and data sets of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import re
import zlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.data.prepare.chunks import Chunk, Unreachable, arrow_error, chunked, reading, require
from lm2_jax.data.prepare.files import FileInput
from lm2_jax.data.texts import decode_text

HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?")


class _Rows:
    """Parsing of the rows of a table with texts in one column."""

    def parse(self, chunk: Chunk) -> Iterator[str | UserError]:
        """See `Input`."""
        for number, value in enumerate(chunk.raw, chunk.first):
            where = f"{self.name}: row {number}"
            try:
                if value is None:
                    raise UserError(f"{where}: {self.field!r} is null; expected a string")
                yield value if isinstance(value, str) else decode_text(value, where)
            except UserError as error:
                yield error


@dataclasses.dataclass(frozen=True)
class ParquetInput(_Rows, FileInput):
    """A parquet table with texts in the column `field`."""

    field: str

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        pa = importlib.import_module("pyarrow")
        with reading(self.name), self.path.open("rb") as file:
            table = importlib.import_module("pyarrow.parquet").ParquetFile(file)
            schema = table.schema_arrow
            if self.field not in schema.names:
                raise UserError(f"{self.name}: has no column {self.field!r}; its columns are {', '.join(schema.names)}")
            kind = schema.field(self.field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{self.name}: column {self.field!r} holds {kind}; expected strings")
            yield from chunked(self._values(pa, table), file.tell, f"{self.name}: row")

    def _values(self, pa: ModuleType, table: Any) -> Iterator[bytes | None]:
        for batch in table.iter_batches(batch_size=256, columns=[self.field]):
            yield from (batch.column(0).cast(pa.large_binary()).to_pylist())  # bytes, decoded one by one


@dataclasses.dataclass(frozen=True)
class HubInput(_Rows):
    """A data set of the Hugging Face hub, streamed, with texts in the column `field`."""

    repository: str
    config: str | None
    split: str
    field: str
    revision: str | None

    size = None

    @property
    def name(self) -> str:
        """`owner/name:config`."""
        return f"{self.repository}:{self.config}" if self.config else self.repository

    def read(self) -> Iterator[Chunk]:
        """See `Input`."""
        datasets = importlib.import_module("datasets")
        try:
            rows = datasets.load_dataset(
                self.repository, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # of any of a dozen libraries
            raise Unreachable(f"{self.name}: cannot be opened ({_first_line(error)})") from None
        yield from chunked(self._values(rows), None, f"{self.name}: row")

    def _values(self, rows: Iterable[dict[str, Any]]) -> Iterator[str | None]:
        for number, row in enumerate(self._reachable(rows), 1):
            if self.field not in row:
                raise UserError(f"{self.name}: has no column {self.field!r}; its columns are {', '.join(row)}")
            value = row[self.field]
            if not isinstance(value, str | None):
                kind = type(value).__name__
                raise UserError(f"{self.name}: row {number}: {self.field!r} holds {kind}; expected strings")
            yield value

    def _reachable(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the rows. Raises Unreachable for faults of the network, the hub or a full cache."""
        try:
            yield from rows
        except Exception as error:  # of any of a dozen libraries
            damaged = isinstance(error, (ValueError, arrow_error())) and not isinstance(error, OSError)
            if damaged or isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
                raise
            raise Unreachable(
                f"{self.name}: the hub sends no more rows ({_first_line(error)}); the same command resumes (if it "
                "always ends here, the hub's data is damaged)"
            ) from None

    def state(self) -> dict[str, Any]:
        """See `Input`."""
        return self.identity()

    def identity(self) -> dict[str, Any]:
        """See `Input`."""
        return {"name": self.name, "split": self.split, "revision": self.revision}


def open_hub(name: str, split: str, field: str) -> HubInput:
    """Opens a data set at the named or newest revision, pinned to its commit."""
    require("datasets", f"{name}: a data set of the Hugging Face hub")
    repository, revision, config = HUB_ID.fullmatch(name).group("repository", "revision", "config")
    try:
        hub = importlib.import_module("huggingface_hub").HfApi()
        commit = hub.dataset_info(repository, revision=revision).sha
    except Exception as error:  # of any of a dozen libraries
        raise UserError(
            f"--input: {name} is no file, and no data set that the Hugging Face hub shows ({_first_line(error)})"
        ) from None
    return HubInput(repository, config, split, field, commit)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
