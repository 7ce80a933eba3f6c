"""A converted lm2_jax directory, which `lm2_jax.load` reads like a run directory.

- config.yaml: complete; tokenizer.path is the name of a file here
- params.safetensors: float32 parameters by path (or shards and their index)
- memory.safetensors: the start memory, where the model carries one
- tokenizer.json or tokenizer.model
- origin/: the small files that came with the weights
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lm2_jax.common.errors import UserError
from lm2_jax.common.storage import AnyPath, StorePath, to_path
from lm2_jax.common.trees import copy_file, upload_tree
from lm2_jax.common.untrusted import resolve_inside
from lm2_jax.config import dump_config, load_config, replace
from lm2_jax.convert.engine import Checkpoint, Entry, Track, abstract_params, check_names, check_values
from lm2_jax.convert.tables import Table
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.model import build_model
from lm2_jax.tokenizer import load_tokenizer, origin_in

_MEMORY = "memory.safetensors"


def is_converted(path: AnyPath) -> bool:
    """True if a directory is a converted one, and not a run directory or a checkpoint."""
    return (path / "config.yaml").is_file() and bool(list(path.glob("params*.safetensors*")))


def read(path: Path, track: Track | None = None) -> Checkpoint:
    """Opens a converted directory. Raises UserError with everything that does not fit its config.

    track: shows progress while every value is checked, too; None: values are not read.
    """
    config = load_config(resolve_inside(path, "config.yaml"))
    if (name := config.tokenizer.path) is not None:
        try:
            config = replace(config, tokenizer={"path": str(resolve_inside(path, name))})
        except UserError as error:
            raise UserError(f"{path / 'config.yaml'}: tokenizer.path: {error}") from None
    tensors = open_tensors(path, "params")
    wanted = [Entry(name, None, name, (), leaf.shape, False) for name, leaf in abstract_params(config).items()]
    check_names(wanted, tensors, Table({}), path)
    if track:
        check_values(track(wanted, "checking"), tensors, path)
    memory = None
    if (path / _MEMORY).is_file():
        if not build_model(config).kind.shares_one_bank:
            raise UserError(f"{path / _MEMORY}: memory.kind {config.memory.kind} carries no start memory; remove it")
        found, N = open_tensors(resolve_inside(path, _MEMORY), "memory"), config.memory.num_slots
        lanes = found["memory_bank"].shape[:1] if "memory_bank" in found else (1,)
        bank = [Entry("memory_bank", None, "memory_bank", (), (*lanes, N, N), False)]
        check_names(bank, found, Table({}), path / _MEMORY)
        check_values(bank, found, path / _MEMORY)
        memory = found["memory_bank"].read()
    return Checkpoint(config, tensors, memory, origin_in(path))


def write(checkpoint: Checkpoint, directory: Path, track: Track) -> None:
    """Writes a converted directory into the existing, empty `directory`."""
    config = checkpoint.config
    if config.tokenizer.path:
        load_tokenizer(config.tokenizer, checkpoint.origin)  # raises UserError if it is unusable
        name = "tokenizer.json" if config.tokenizer.kind == "tokenizers" else "tokenizer.model"
        copy_file(to_path(config.tokenizer.path), directory / name)
        config = replace(config, tokenizer={"path": name})
    (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_tensors(
        directory, "params", ((path, tensor.read()) for path, tensor in track(checkpoint.params.items(), "writing"))
    )
    if checkpoint.memory is not None:
        write_tensors(directory, "memory", [("memory_bank", checkpoint.memory)])
    if checkpoint.origin is not None:
        checkpoint.origin.copy_to(directory)


@contextlib.contextmanager
def new_directory(output: AnyPath) -> Iterator[Path]:
    """An empty directory that becomes `output` on success, and is removed on failure.

    Raises UserError if `output` is there already, or cannot be made or written.
    """
    if isinstance(output, StorePath):
        with _uploaded(output) as directory:
            yield directory
        return
    whole = Path(os.path.abspath(output))
    try:
        if os.path.lexists(whole) and not (whole.is_dir() and not any(whole.iterdir())):
            raise UserError(f"--output: {output} is there already; give another directory, or remove it")
        partial = whole.parent / f".{whole.name}.{os.getpid()}.partial"
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be made ({error.strerror})") from None
    try:
        yield partial
        if whole.exists():
            whole.rmdir()
        partial.rename(whole)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output: {output} cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _uploaded(output: StorePath) -> Iterator[Path]:
    """`new_directory` in a store: the file by which a converted directory is recognised is uploaded last."""
    try:
        if output.exists():
            raise UserError(f"--output: {output} is there already; give another directory, or remove it")
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
            upload_tree(Path(directory), output, last=("config.yaml", "config.json"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output: {output} cannot be written ({error})") from None
