"""Converts checkpoints between lm2_jax, the official LM2 code and Hugging Face; and from GGUF.

A Llama converted with a memory (the third example) is a warm start: an lm2 whose logits are the Llama's until it is
trained (train.init_from). Everything that does not fit is named, and then nothing is written.
"""

from __future__ import annotations

import functools
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.jax_stack import check_jax_stack
from lm2_jax.common.local_copies import local_copy, local_tree
from lm2_jax.common.storage import AnyPath, to_path

if TYPE_CHECKING:
    from lm2_jax.convert.engine import Checkpoint

FORMATS = ("official", "huggingface", "lm2_jax")
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """The command."""
    parser = parser_for(
        "convert_checkpoint",
        __doc__,
        "--from lm2_jax --to huggingface --input runs/babilong_tiny --output hf/tiny",
        "--from huggingface --to lm2_jax --input Llama-3.2-1B --output llama",
        "--from huggingface --to lm2_jax --input Llama-3.2-1B --output lm2 "
        "--set memory.kind=lm2 --set memory.num_slots=2048",
        "--from gguf --to lm2_jax --input SmolLM2-135M-Instruct.Q4_1.gguf --output smol",
    )
    parser.add_argument("--from", dest="source", required=True, choices=(*FORMATS, "gguf"), help="format of --input")
    parser.add_argument("--to", dest="target", required=True, choices=FORMATS, help="format of --output")
    parser.add_argument(
        "--input",
        type=to_path,
        required=True,
        metavar="PATH",
        help="a directory; official: or its state-dict file; gguf: a file",
    )
    parser.add_argument(
        "--output", type=to_path, required=True, metavar="DIR", help="a directory that is not there yet"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of what is written for others; lm2_jax is float32"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the lm2_jax model; repeatable"
    )
    arguments = parser.parse_args()
    check_jax_stack()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, leaving nothing behind
    convert(arguments.source, arguments.target, arguments.input, arguments.output, arguments.dtype, arguments.set)


def convert(source: str, target: str, path: AnyPath, output: AnyPath, dtype: str, overrides: list[str]) -> None:
    """Reads a checkpoint of one format and writes it in another. Raises UserError, and then writes nothing."""
    from lm2_jax.convert import directory, gguf, huggingface, official  # imported late so that --help stays fast

    if not path.exists():
        raise UserError(f"--input: {path} is not there")
    if source != "lm2_jax":
        path = _here(path)
    with directory.new_directory(output) as partial, tempfile.TemporaryDirectory() as files:
        if source == "official":
            checkpoint = official.read(path, overrides, _track)
        elif source == "huggingface":
            checkpoint = huggingface.read(path, overrides, _track)
        elif source == "gguf":
            checkpoint = gguf.read(path, Path(files), overrides, _track)
        else:
            checkpoint = read_own(path, overrides)

        if target == "official":
            official.write(checkpoint, partial, dtype, _track)
        elif target == "huggingface":
            huggingface.write(checkpoint, partial, dtype, _track)
        else:
            directory.write(checkpoint, partial, _track)
    count = sum(tensor.size for tensor in checkpoint.params.values())
    print(f"{output}: {count:,} parameters, memory {checkpoint.config.memory.kind}")


def read_own(path: AnyPath, overrides: list[str]) -> Checkpoint:
    """A converted directory, tensor by tensor; or a run directory or a checkpoint, whole."""
    from lm2_jax.convert import directory, engine

    if overrides:
        raise UserError("--set: an lm2_jax checkpoint has its settings; they cannot be changed by converting it")
    if directory.is_converted(path):
        return directory.read(local_tree(path), _track)
    from lm2_jax.loading import load_run, read_progress
    from lm2_jax.model import lora
    from lm2_jax.tokenizer import origin_of_model

    config, _, params = load_run(path)
    config, params = lora.without(config), lora.merge(params, config.model)
    origin = origin_of_model(config.tokenizer, path)
    return engine.Checkpoint(config, engine.from_arrays(params, path), origin=origin, trained=read_progress(path))


def _here(path: AnyPath) -> Path:
    """An input on this machine: a directory, or a file with those beside it. Raises UserError if it cannot be read."""
    if isinstance(path, Path):
        return path
    try:
        if path.suffix == ".gguf":
            return local_copy(path)
        return local_tree(path) if path.is_dir() else local_tree(path.parent) / path.name
    except OSError as error:
        raise UserError(f"--input: {path} cannot be read ({error.strerror})") from None


def _track(items: Iterable, title: str) -> Iterable:
    console = Console(stderr=True)
    return track(list(items), title, console=console, disable=not console.is_terminal)


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
