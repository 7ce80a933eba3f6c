"""Files of named tensors, read and written one by one: safetensors (single or sharded) and, to read, PyTorch files.

Only what torch's `weights_only` admits is ever unpickled: tensors and plain containers.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm2_jax.common.errors import UserError
from lm2_jax.common.untrusted import LONGEST_JSON, read_json, resolve_inside

SHARD_BYTES = 1 << 30
_INDEX = ".safetensors.index.json"
_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class Tensor(NamedTuple):
    """A tensor that has not been read yet.

    Attributes:
      file: where it is, for messages.
      shape: its sizes.
      dtype: as safetensors names it: F32, BF16, I64, ...
      read: reads it; a floating-point array of at most 32 bits. read(i) reads row i of its first axis alone.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """True if it holds floating-point numbers that float32 represents exactly."""
        return self.dtype in _FLOATS


def open_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a file, or of a directory's {stem}.safetensors or {stem}.safetensors.index.json, by name.

    Other files are taken for PyTorch's. Raises UserError with all problems: no such file, a damaged header or a
    truncated file, an index that is not about its files, a name in two shards.
    """
    if path.is_file():
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
    single, index = path / f"{stem}.safetensors", path / f"{stem}{_INDEX}"
    if single.is_file() and index.is_file():
        raise UserError(f"{path}: holds both {single.name} and {index.name}; remove the one that is not meant")
    if single.is_file():
        return _open_safetensors(resolve_inside(path, single.name))
    if index.is_file():
        return _open_shards(resolve_inside(path, index.name))
    raise UserError(f"{path}: holds neither {single.name} nor {index.name}")


def write_tensors(
    directory: Path, stem: str, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes {stem}.safetensors, or shards of about `shard_bytes` and their index, holding one shard at a time."""
    parts: list[tuple[Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        part = directory / f"{stem}.part{len(parts) + 1}"
        save_file(held, part, metadata={"format": "pt"})
        part.chmod(0o644)  # readable like other files
        parts.append((part, list(held)))
        held.clear()

    for name, array in tensors:
        if held and sum(a.nbytes for a in held.values()) + array.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(array).reshape(array.shape)  # numpy makes [] into [1]
        total += array.nbytes
    flush()

    if len(parts) == 1:
        parts[0][0].rename(directory / f"{stem}.safetensors")
        return
    weight_map = {}
    for number, (part, names) in enumerate(parts, 1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        part.rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{stem}{_INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        _refuse_doubles(path)
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is no whole safetensors file ({error})") from None

    def reader(name: str) -> Callable[..., np.ndarray]:
        def read(row: int | None = None) -> np.ndarray:
            with safe_open(path, "np") as file:  # opened anew each time: mapped pages count as the process's memory
                return file.get_tensor(name) if row is None else file.get_slice(name)[row]

        return read

    return {name: Tensor(path, shape, dtype, reader(name)) for name, (shape, dtype) in headers.items()}


def _refuse_doubles(path: Path) -> None:
    """Raises UserError for a header that names a tensor twice, of which safetensors would take the last."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LONGEST_JSON:
            raise SafetensorError(f"a header of {size:,} bytes; expected {LONGEST_JSON:,} at most")
        header = file.read(size)
    doubles: set[str] = set()

    def pairs(items: list[tuple[str, Any]]) -> None:
        count = collections.Counter(name for name, _ in items)
        doubles.update(name for name, times in count.items() if times > 1)

    with contextlib.suppress(ValueError, RecursionError):  # safetensors says what is wrong with it
        json.loads(header, object_pairs_hook=pairs)
    if doubles:
        raise UserError(f"{path}: names twice: {', '.join(sorted(doubles))}")


def _open_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index}: weight_map: expected the file of every tensor, {{name: file}}")
    tensors: dict[str, Tensor] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        try:
            shard = _open_safetensors(resolve_inside(index.parent, file))
        except UserError as error:
            problems.append(str(error))
            continue
        problems += [f"{name}: in {tensors[name].file.name} and again in {file}" for name in shard if name in tensors]
        problems += [f"{name}: in {file}, not where the index says" for name in shard if weight_map.get(name) != file]
        listed = (name for name, where in weight_map.items() if where == file)
        problems += [f"{name}: not in {file}, where the index says it is" for name in listed if name not in shard]
        tensors |= shard
    if problems:
        raise UserError(f"{index}: does not describe its files:\n" + "\n".join(f"  {p}" for p in problems))
    return tensors


def _open_torch(path: Path) -> dict[str, Tensor]:
    try:
        import torch  # needed by this alone
    except ImportError:
        raise UserError(f"{path}: to read a PyTorch file, install torch; or give a .safetensors file") from None
    try:
        with zipfile.ZipFile(path) as parts:
            if any(part.file_size > part.compress_size for part in parts.infolist()):
                raise ValueError("it is compressed")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises errors of many types for foreign or unsafe files
        first_line = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}: is no PyTorch file of plain tensors ({first_line})") from None
    state = loaded.get("model_state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict; expected named tensors, alone or under model_state_dict")

    def is_plain(tensor: Any) -> bool:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return False
        return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()  # else it repeats a few

    odd = [str(name) for name, tensor in state.items() if not is_plain(tensor)]
    if odd:
        raise UserError(f"{path}: sparse, or without numbers of their own: {', '.join(odd)}; expected plain tensors")

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def reader(tensor: Any) -> Callable[..., np.ndarray]:
        def read(row: int | None = None) -> np.ndarray:
            chosen = tensor if row is None else tensor[row]
            if chosen.dtype == torch.bfloat16:
                return chosen.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return chosen.numpy()

        return read

    return {
        str(name): Tensor(path, tuple(t.shape), names.get(t.dtype, str(t.dtype)), reader(t.detach()))
        for name, t in state.items()
    }
