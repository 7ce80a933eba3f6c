"""Measures training and decoding on the devices at hand, always as a ratio to something measured with it.

    python -m lm2_jax.bench --config configs/babilong_tiny.yaml --output bench.json

Every table is one comparison: its programs are compiled, then run in turns, so that a busy machine slows all of them
alike. The tokens are random; the weights are fresh.
"""

from __future__ import annotations

import functools
from typing import Any

from lm2_jax.common.command_line import bench_arguments
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.jax_stack import check_jax_stack
from lm2_jax.common.storage import has_directory


def main() -> None:
    """The command."""
    arguments = bench_arguments()
    if arguments.rounds < 1:
        raise UserError(f"--rounds: found {arguments.rounds}; expected 1 or more")
    if arguments.output is not None and not has_directory(arguments.output):
        raise UserError(f"--output: found {arguments.output}; its directory does not exist")
    check_jax_stack()

    # imported late so that --help stays fast
    import json

    import jax
    from rich.console import Console

    from lm2_jax.compiled.comparisons import comparisons
    from lm2_jax.compiled.peers import peer_comparisons
    from lm2_jax.compiled.timing import measure, table_of
    from lm2_jax.config import load_config
    from lm2_jax.model import build_model
    from lm2_jax.segments import choose_schedule
    from lm2_jax.tokenizer import with_vocabulary

    config = with_vocabulary(load_config(arguments.config, arguments.set))
    if config.memory.kind != "lm2" and arguments.against is None:
        raise UserError(f"memory.kind: found {config.memory.kind}; bench compares a config of lm2 with none and rmt")
    found = list(comparisons(config) if arguments.against is None else peer_comparisons(config))
    wanted = [c for c in found if arguments.only.lower() in c.title.lower()]
    if not wanted:
        titles = "\n".join(f"  {comparison.title}" for comparison in found)
        raise UserError(f"--only: found {arguments.only!r}, which no title contains; the titles are\n{titles}")
    console, device = Console(highlight=False, soft_wrap=True), jax.devices()[0].device_kind
    schedule = choose_schedule(build_model(config), "auto")
    console.print(f"{jax.device_count()} {device} device(s); schedule auto is {schedule}")
    figures: dict[str, Any] = {
        "device": device,
        "devices": jax.device_count(),
        "rounds": arguments.rounds,
        "config": config.model_dump(mode="json"),
        "races": {},
    }
    with console.status("") as status:
        for comparison in wanted:
            rows = measure(
                comparison, arguments.rounds, lambda text, title=comparison.title: status.update(f"{title}: {text}")
            )
            figures["races"][comparison.title] = rows
            console.print(table_of(comparison, rows))
            if arguments.output is not None:  # after every comparison: an interrupted run keeps what it measured
                arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
