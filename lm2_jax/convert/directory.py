"""A converted lm2_jax directory, which `lm2_jax.load` reads like a run directory.

config.yaml           complete; tokenizer.path is relative to the directory
params.safetensors    float32 parameters by path (or shards and their index)
memory.safetensors    the start memory, where the model carries one
tokenizer.json or tokenizer.model
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lm2_jax.config import dump_config, load_config, replace
from lm2_jax.convert.engine import Checkpoint, Entry, Track, abstract_params, check_names, check_values
from lm2_jax.convert.tables import Table
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.errors import UserError
from lm2_jax.model import build_model

_MEMORY = "memory.safetensors"


def is_converted(path: Path) -> bool:
    """Whether a directory is a converted one, and not a run directory or a checkpoint."""
    return (path / "config.yaml").is_file() and bool(list(path.glob("params*.safetensors*")))


def read(path: Path, track: Track | None = None) -> Checkpoint:
    """Opens a converted directory. Raises UserError with everything that does not fit its config.

    track: also look at every number, with this progress.
    """
    config = load_config(path / "config.yaml")
    if config.tokenizer.path:
        config = replace(config, tokenizer={"path": str(path / config.tokenizer.path)})
    tensors = open_tensors(path, "params")
    wanted = [Entry(name, None, name, (), leaf.shape, False) for name, leaf in abstract_params(config).items()]
    check_names(wanted, tensors, Table({}), path)
    if track:
        check_values(track(wanted, "checking"), tensors, path)
    memory = None
    if (path / _MEMORY).is_file():
        found = open_tensors(path / _MEMORY, "memory")
        expected = build_model(config).init_memory(1)
        if set(found) != {"memory_bank"} or found["memory_bank"].shape[1:] != expected.shape[1:]:
            raise UserError(f"{path / _MEMORY}: expected memory_bank [lanes, {expected.shape[1]}, {expected.shape[2]}]")
        memory = found["memory_bank"].read()
    return Checkpoint(config, tensors, memory)


def write(checkpoint: Checkpoint, directory: Path, track: Track) -> None:
    """Writes a converted directory; `directory` is there and empty."""
    config = checkpoint.config
    if config.tokenizer.path:
        name = "tokenizer.json" if config.tokenizer.kind == "tokenizers" else "tokenizer.model"
        shutil.copyfile(config.tokenizer.path, directory / name)
        config = replace(config, tokenizer={"path": name})
    (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_tensors(
        directory, "params", ((path, tensor.read()) for path, tensor in track(checkpoint.params.items(), "writing"))
    )
    if checkpoint.memory is not None:
        write_tensors(directory, "memory", [("memory_bank", checkpoint.memory)])


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """An empty directory that becomes `output` when all went well, and vanishes when not.

    Raises UserError if `output` is there already, or cannot be made.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output: {output} is there already; give another directory, or remove it")
    partial = output.parent / f".{output.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be made ({error.strerror})") from None
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
