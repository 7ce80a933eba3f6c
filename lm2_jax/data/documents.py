"""Documents: token ids from text files, JSON lines and the official `.bin` shards, as random-access sources."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import expand_paths
from lm2_jax.common.local_copies import local_copy
from lm2_jax.common.storage import AnyPath
from lm2_jax.data.texts import bom_size, check_line, cut_text, decode_text, json_text, read_lines, tokenize
from lm2_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, tokenised.

    Attributes:
      tokens: int32 [n], with the tokenizer's begin and end tokens where it has them.
      answers: bool [n], True where the token belongs to the answer of a question.
      text_bytes: UTF-8 bytes of the text that the tokens stand for; None where that is not known.
    """

    tokens: np.ndarray
    answers: np.ndarray
    text_bytes: int | None = None


class DocumentSource(Protocol):
    """Documents by number. The same number always gives the same document; `repr` describes the source in a few words.

    Attributes:
      lengths: int [len(self)], the tokens of each document, where that is known without reading them; else None.
    """

    lengths: np.ndarray | None = None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def get_many(self, indices: Sequence[int]) -> list[Document]:
        """Documents by their numbers."""
        return [self[index] for index in indices]

    def ordinals(self, seed: int) -> grain.MapDataset[int]:
        """The order of reading, without end: ordinal p + e * len(self) -> the number of document p of epoch e.

        Every epoch is another permutation, drawn from `len(self)`, `seed` and the epoch alone.
        """
        import grain  # imported late: those who only prepare data do without

        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(None)


class _FileSource(DocumentSource, abc.ABC):
    """Documents that are byte spans of files: found once at the start, read again on every access.

    Raises UserError with the problems of all files, or if there is no document at all.
    """

    def __init__(self, paths: Sequence[str | AnyPath], key: str) -> None:
        self._paths = expand_paths(paths, key)
        self._files: list[Path] = []  # the same, or copies of those in a store
        spans, problems = array("q"), []
        for number, path in enumerate(self._paths):
            try:
                self._files.append(local_copy(path))
                for start, end in self._find(self._files[-1]):
                    spans.extend((number, start, end))
            except UserError as error:
                problems.append(str(error).replace(str(self._files[-1]), str(path)))
            except OSError as error:
                problems.append(f"{path}: cannot be read ({error.strerror})")
        if problems:
            raise UserError("\n".join(problems))
        if not spans:
            raise UserError(f"{key}: no documents; all files are empty: {', '.join(map(str, self._paths))}")
        self._spans = np.array(spans, np.int64).reshape(-1, 3)  # file number, first byte, byte after the last

    @abc.abstractmethod
    def _find(self, path: Path) -> Iterable[tuple[int, int]]:
        """Checks a file and yields the byte spans of its documents."""

    @abc.abstractmethod
    def _parse(self, data: bytes) -> tuple[np.ndarray, int | None]:
        """Turns one span's bytes into tokens [n], and counts the bytes of its text."""

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Document:
        """Reads a document. Raises UserError if its file is gone, or has changed since the start."""
        number, start, end = self._spans[index].tolist()
        path = self._paths[number]
        try:
            with self._open(number) as file:
                file.seek(start)
                data = file.read(end - start)
            if len(data) != end - start:
                raise ValueError("it is shorter")
            tokens, text_bytes = self._parse(data)
        except OSError as error:
            raise UserError(f"{path}: cannot be read any more ({error.strerror}); put it back") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: has changed since it was opened ({error}); put the old one back") from None
        return Document(tokens.astype(np.int32), np.zeros(len(tokens), bool), text_bytes)

    def _open(self, number: int) -> BinaryIO:
        try:
            return self._files[number].open("rb")
        except FileNotFoundError:  # copies that nobody has asked for in a week are removed
            if local_copy(self._paths[number]) != self._files[number]:
                raise ValueError("it is another version") from None
            return self._files[number].open("rb")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(files={len(self._paths)}, documents={len(self)})"


class TextSource(_FileSource):
    """UTF-8 text files, each one document or several; documents of nothing but white space are left out.

    Args:
      paths: files and globs.
      separator: a regular expression (`^` and `$` match at lines); a new document starts where a match does.
      key: the setting that `paths` come from, for messages.
    """

    def __init__(
        self,
        paths: Sequence[str | AnyPath],
        tokenizer: Tokenizer,
        separator: str | None = None,
        key: str = "data.path",
    ) -> None:
        self._tokenizer = tokenizer
        self._separator = separator
        super().__init__(paths, key)

    def _find(self, path: Path) -> Iterator[tuple[int, int]]:
        _reject_compressed(path)
        data = path.read_bytes()
        start = bom_size(data)
        text = decode_text(data[start:], path, start)
        for piece in cut_text(text, self._separator):
            end = start + len(piece.encode())
            if piece.strip():
                yield start, end
            start = end

    def _parse(self, data: bytes) -> tuple[np.ndarray, int | None]:
        return tokenize(data.decode(), self._tokenizer), len(data)


class JsonLinesSource(_FileSource):
    """JSON lines: each an object whose `text` is a document; blank lines and blank texts are left out.

    Args:
      paths: files and globs; uncompressed.
      key: the setting that `paths` come from, for messages.
    """

    def __init__(self, paths: Sequence[str | AnyPath], tokenizer: Tokenizer, key: str = "data.path") -> None:
        self._tokenizer = tokenizer
        super().__init__(paths, key)

    def _find(self, path: Path) -> Iterator[tuple[int, int]]:
        _reject_compressed(path)
        with path.open("rb") as file:
            start = bom_size(file.read(3))
            file.seek(start)
            for number, line in enumerate(read_lines(file), start=1):
                check_line(line, f"{path}: line {number}")
                end = start + len(line)
                if line.strip() and json_text(decode_text(line, path, start), f"{path}: line {number}").strip():
                    yield start, end
                start = end

    def _parse(self, data: bytes) -> tuple[np.ndarray, int | None]:
        text = json.loads(data.decode())["text"]
        return tokenize(text, self._tokenizer), len(text.encode())


class BinSource(_FileSource):
    """Shards of the official code: 256 int32 (magic, version, number of tokens, zeros), then the tokens as uint32.

    A document begins at each begin token; tokens before a shard's first one are a document too.

    Args:
      paths: files and globs.
      vocab_size: of the model; every id must be below it.
      bos_id: the begin token, Llama-3's unless told otherwise.
      key: the setting that `paths` come from, for messages.
    """

    MAGIC, VERSION, HEADER_BYTES = 20240801, 7, 1024
    _CHUNK = 1 << 22  # tokens checked at a time

    def __init__(
        self, paths: Sequence[str | AnyPath], vocab_size: int, bos_id: int = 128_000, key: str = "data.path"
    ) -> None:
        self._vocab_size = vocab_size
        self._bos_id = bos_id
        super().__init__(paths, key)
        self.lengths = (self._spans[:, 2] - self._spans[:, 1]) // 4

    def _find(self, path: Path) -> Iterator[tuple[int, int]]:
        count = self._check_header(path)
        if not count:
            return
        tokens = np.memmap(path, "<u4", mode="r", offset=self.HEADER_BYTES, shape=(count,))
        document = 0
        for start in range(0, count, self._CHUNK):
            chunk = tokens[start : start + self._CHUNK]
            if (largest := int(chunk.max())) >= self._vocab_size:
                raise UserError(
                    f"{path}: token {start + int(chunk.argmax())} is id {largest}, outside of a vocabulary of "
                    f"{self._vocab_size}; set the vocabulary that the shard was made with"
                )
            for begin in (start + np.flatnonzero(chunk == self._bos_id)).tolist():
                if begin > document:
                    yield self._offset(document), self._offset(begin)
                document = begin
        yield self._offset(document), self._offset(count)

    def _check_header(self, path: Path) -> int:
        """The number of tokens in a shard. Raises UserError if header and size do not agree."""
        header = np.fromfile(path, "<i4", count=256)
        if len(header) < 256:
            raise UserError(
                f"{path}: ends inside its header; a shard starts with a header of {self.HEADER_BYTES} bytes"
            )
        magic, version, count = header[:3].tolist()
        if (magic, version) != (self.MAGIC, self.VERSION):
            raise UserError(
                f"{path}: magic {magic}, version {version}; expected {self.MAGIC}, {self.VERSION} (uint32 tokens)"
            )
        if (size := path.stat().st_size) != self._offset(count):
            raise UserError(
                f"{path}: {size} bytes, but its header promises {count} tokens, that is {self._offset(count)} bytes; "
                f"the file is {'cut short' if size < self._offset(count) else 'longer than that'}"
            )
        return count

    def _offset(self, token: int) -> int:
        return self.HEADER_BYTES + 4 * token

    def _parse(self, data: bytes) -> tuple[np.ndarray, int | None]:
        return np.frombuffer(data, "<u4"), None


def _reject_compressed(path: Path) -> None:
    if path.suffix in (".gz", ".zst", ".bz2", ".xz"):
        raise UserError(f"{path}: is compressed; unpack it first, as only plain files are read")


# --- Parts and mixtures of sources -----------------------------------------------------------------------------------


class Subset(DocumentSource):
    """Some documents of a source, in its order.

    Args:
      indices: int [n], their numbers in `source`.
    """

    def __init__(self, source: DocumentSource, indices: np.ndarray) -> None:
        self._source = source
        self._indices = indices
        self.lengths = None if source.lengths is None else source.lengths[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self._source[int(self._indices[index])]

    def get_many(self, indices: Sequence[int]) -> list[Document]:
        """See `DocumentSource`."""
        return self._source.get_many([int(self._indices[index]) for index in indices])

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {self._source!r})"


def split_documents(
    source: DocumentSource, validation_fraction: float, seed: int
) -> tuple[DocumentSource, DocumentSource | None]:
    """Splits a source into training and validation documents: a share of it, drawn by `seed`, is held out.

    The share is rounded to whole documents, at least one; with a fraction of 0 nothing is held out (None).

    Raises UserError when no document would be left for training.
    """
    if validation_fraction == 0:
        return source, None
    total = len(source)
    held_out = max(1, round(validation_fraction * total))
    if held_out >= total:
        raise UserError(
            f"data.validation_fraction {validation_fraction} holds out {held_out} of {total} documents and leaves none "
            "to train on; cut the text with data.document_separator, name other files in data.validation_path, or set "
            "data.validation_fraction to 0"
        )
    # RandomState: numpy promises never to change its streams, so a resumed run holds out the same documents.
    order = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).permutation(total)
    return Subset(source, np.sort(order[held_out:])), Subset(source, np.sort(order[:held_out]))


class Mixture(DocumentSource):
    """The documents of several sources, one source after the other, read in the proportion of weights.

    Args:
      sources: the sources.
      weights: positive, one a source; only their ratios count.
    """

    def __init__(self, sources: Sequence[DocumentSource], weights: Sequence[float]) -> None:
        self._sources, self._weights = tuple(sources), tuple(weights)
        self._starts = np.cumsum([0, *map(len, sources)])
        lengths = [source.lengths for source in sources]
        self.lengths = None if any(of_source is None for of_source in lengths) else np.concatenate(lengths)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Document:
        return self.get_many([index])[0]

    def get_many(self, indices: Sequence[int]) -> list[Document]:
        """See `DocumentSource`; each source is asked once."""
        numbers = (np.searchsorted(self._starts, indices, side="right") - 1).tolist()
        found: dict[int, Document] = {}
        for number in set(numbers):
            here = [index for index, of in zip(indices, numbers, strict=True) if of == number]
            documents = self._sources[number].get_many([index - int(self._starts[number]) for index in here])
            found |= dict(zip(here, documents, strict=True))
        return [found[index] for index in indices]

    def __repr__(self) -> str:
        weighted = zip(self._weights, self._sources, strict=True)
        return f"Mixture({', '.join(f'{weight:g} x {source!r}' for weight, source in weighted)})"

    def ordinals(self, seed: int) -> grain.MapDataset[int]:
        """The order of reading, without end: ordinal -> document number, a function of `seed` and the ordinal alone.

        Each source is read in an order of its own, shuffled anew in each of its epochs. Each gets its share of a long
        stretch of ordinals, to a hundredth of it: grain rounds weights to hundredths of the smallest.
        """
        import grain  # imported late: those who only prepare data do without

        orders = [
            grain.MapDataset.range(start, stop).seed(seed + number).shuffle().repeat(None)
            for number, (start, stop) in enumerate(itertools.pairwise(self._starts.tolist()))
        ]
        return grain.MapDataset.mix(orders, self._weights)
