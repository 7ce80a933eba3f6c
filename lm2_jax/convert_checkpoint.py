"""Converts checkpoints between lm2_jax, the official LM2 code and Hugging Face; from GGUF; to adapters and back.

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
from lm2_jax.common.local_copies import local_input
from lm2_jax.common.storage import AnyPath, to_path

if TYPE_CHECKING:
    from lm2_jax.convert.engine import Checkpoint

TARGETS = ("official", "huggingface", "lm2_jax", "adapter")
SOURCES = (*TARGETS, "gguf")
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
        "--from lm2_jax --to adapter --input runs/adopt_smollm2 --output adapter",
        "--from adapter --to huggingface --input adapter --base SmolLM2-135M-Instruct --output hf",
    )
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES, help="format of --input")
    parser.add_argument("--to", dest="target", required=True, choices=TARGETS, help="format of --output")
    parser.add_argument(
        "--input",
        type=to_path,
        required=True,
        metavar="PATH",
        help="a directory; official: or its state-dict file; gguf: a file",
    )
    parser.add_argument("--base", type=to_path, metavar="PATH", help="--from adapter: the Llama that it goes onto")
    parser.add_argument(
        "--output", type=to_path, required=True, metavar="DIR", help="a directory that is not there yet"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of what is written for others; lm2_jax is float32"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the lm2_jax model; repeatable"
    )
    asked = parser.parse_args()
    check_jax_stack()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, leaving nothing behind
    convert(asked.source, asked.target, asked.input, asked.output, asked.dtype, asked.set, asked.base)


def convert(
    source: str,
    target: str,
    path: AnyPath,
    output: AnyPath,
    dtype: str,
    overrides: list[str],
    base: AnyPath | None = None,
) -> None:
    """Reads a checkpoint of one format and writes it in another. Raises UserError, and then writes nothing.

    base: of an adapter, the Llama it goes onto.
    """
    from lm2_jax.convert import adapter, directory, engine, huggingface, official  # late so that --help stays fast

    _check(source, target, path, base, overrides)
    path = path if source == "lm2_jax" else local_input(path, "--input")
    base = base and local_input(base, "--base")
    with directory.new_directory(output) as partial, tempfile.TemporaryDirectory() as files:
        if source == "adapter":
            checkpoint = adapter.read(path, _read(adapter.format_of(base), base, Path(files), []), base, _track)
        else:
            checkpoint = _read(source, path, Path(files), overrides)
        checkpoint = checkpoint if target == "adapter" else engine.merged(checkpoint)
        count = f"{sum(tensor.size for tensor in checkpoint.params.values()):,}"
        if target == "adapter":
            count = f"{adapter.write(checkpoint, partial, dtype, _track):,} of {count}"
        elif target == "lm2_jax":
            directory.write(checkpoint, partial, _track)
        else:
            {"official": official, "huggingface": huggingface}[target].write(checkpoint, partial, dtype, _track)
    print(f"{output}: {count} parameters, memory {checkpoint.config.memory.kind}")


def _check(source: str, target: str, path: AnyPath, base: AnyPath | None, overrides: list[str]) -> None:
    for option, given in {"--input": path, "--base": base}.items():
        if given is not None and not given.exists():
            raise UserError(f"{option}: {given} is not there")
    if (source == "adapter") != (base is not None):
        raise UserError("--base is the Llama that an adapter goes onto: give --from adapter and --base, or neither")
    if target == "adapter" and source != "lm2_jax":
        raise UserError(f"--to adapter needs --from lm2_jax, whose runs say what they trained; found --from {source}")
    if overrides and source in ("lm2_jax", "adapter"):
        raise UserError(f"--set: {source} has its settings; they cannot be changed by converting it")


def _read(source: str, path: AnyPath, files: Path, overrides: list[str]) -> Checkpoint:
    from lm2_jax.convert import gguf, huggingface, official

    if source == "official":
        return official.read(path, overrides, _track)
    if source == "huggingface":
        return huggingface.read(path, overrides, _track)
    if source == "gguf":
        return gguf.read(path, files, overrides, _track)
    from lm2_jax.loading import read_checkpoint

    return read_checkpoint(path, _track)


def _track(items: Iterable, title: str) -> Iterable:
    console = Console(stderr=True)
    return track(list(items), title, console=console, disable=not console.is_terminal)


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
