"""Trains a model: `python -m lm2_jax.train --config configs/babilong_tiny.yaml --set train.steps=100`.

A run directory (train.run_dir) that holds a checkpoint is resumed, bit for bit as if the run had never stopped.
"""

from __future__ import annotations

import contextlib
import functools

from lm2_jax.common.command_line import train_arguments
from lm2_jax.common.errors import run_command, store_failures
from lm2_jax.common.jax_stack import check_jax_stack
from lm2_jax.config import load_config


def main() -> None:
    """The command."""
    arguments = train_arguments()
    check_jax_stack()
    import jax  # imported late so that --help stays fast

    from lm2_jax.compiled.explain import explain_sharding
    from lm2_jax.compiled.remat import with_remat
    from lm2_jax.parallel.processes import joined
    from lm2_jax.tokenizer import with_vocabulary
    from lm2_jax.training.loop import train
    from lm2_jax.training.verify import verify

    if arguments.verify is not None:
        verify(arguments.verify)
        return
    config = load_config(arguments.config, arguments.set)
    if arguments.explain_sharding:
        print(explain_sharding(with_vocabulary(config), jax.devices()))
        return
    with joined() if arguments.distributed else contextlib.nullcontext(), store_failures():
        train(with_remat(config, print))


command = functools.partial(run_command, main, interrupted="interrupted; the same command resumes")

if __name__ == "__main__":
    command()
