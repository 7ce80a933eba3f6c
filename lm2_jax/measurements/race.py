"""Compiles the race at length: lm2, rmt and full attention of 1.7 billion parameters, trained on ever longer texts.

Each cell is compiled for a v5e:4x4 by `python -m lm2_jax.aot` in a process of its own, and its figures are kept as
OUTPUT/NAME.json; what is there already is not compiled again. lm2 and rmt read a text in segments; full attention has
it as one segment, whose tokens several chips share where one would take longer or has not enough memory.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import TrainingFailed, run_command
from lm2_jax.common.storage import to_local_path

TOPOLOGY = "v5e:4x4"
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}  # tokens of context; rmt's segments are 32 of 2,048 tokens shorter


def cells() -> dict[str, tuple[str, list[str]]]:
    """Name of each cell -> its config, and what is changed in it."""
    found = {}
    for name, length in LENGTHS.items():
        for model in ("lm2", "rmt"):
            found[f"{model}-{name}"] = f"{model}_1b7", [f"data.segments_per_window={length // 2048}"]
    full = ["data.segments_per_window=1"]
    for cell, length, context, lanes, how in (
        ("8k", 8192, 1, 16, "gather"),
        ("32k", 32768, 1, 16, "gather"),
        ("32k-gather_4", 32768, 4, 4, "gather"),
        ("128k-gather_16", 131072, 16, 1, "gather"),
        ("128k-ring_16", 131072, 16, 1, "ring"),
    ):
        sizes = [f"data.segment_length={length}", f"data.batch_size={lanes}"]
        mesh = [f"mesh.context={context}", f"mesh.context_keys={how}"]
        found[f"full_attention-{cell}"] = "llama_1b7", [*full, *sizes, *mesh]
    return found


def main() -> None:
    """The command."""
    parser = parser_for("measurements.race", __doc__, "--output docs/results/race")
    parser.add_argument(
        "--output", type=to_local_path, required=True, metavar="DIRECTORY", help="where figures are kept"
    )
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, (name, (config, changes)) in enumerate(cells().items(), 1):
        file = (output / f"{name}.json").absolute()
        if not file.exists():
            print(f"{number}/{len(cells())} {name}", flush=True)
            command = [sys.executable, "-m", "lm2_jax.aot", "--config", config, "--topology", TOPOLOGY]
            command += ["--program", "train", "--output", str(file)]
            for change in changes:
                command += ["--set", change]
            done = subprocess.run(command, stdout=subprocess.DEVNULL)
            failed += [name] if done.returncode else []
    print(table(output))
    if failed:
        raise TrainingFailed(f"not compiled, or too large: {', '.join(failed)}")


def table(directory: Path) -> str:
    """The cells that are there, in Markdown, with their speed beside that of full attention at its best."""
    figures = {name: json.loads(file.read_text()) for name in cells() if (file := directory / f"{name}.json").exists()}
    speed = {name: rate for name, found in figures.items() if (rate := _tokens_per_second(found))}
    rows = [
        "| context | model | lanes | chips a lane | peak GiB | step, s | tokens/s | of full attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in LENGTHS:
        own = [name for name in figures if name.split("-")[1] == length]
        best = max((speed[name] for name in own if name.startswith("full") and name in speed), default=None)
        for name in own:
            step, data = figures[name]["programs"]["train"], figures[name]["config"]["data"]
            model, _, *how = name.split("-")
            title = " ".join([model.replace("_", " "), *(word.split("_")[0] for word in how)])
            chips = figures[name]["config"]["mesh"]["context"]
            row = f"| {length} | {title} | {data['batch_size']} | {chips} "
            if name not in speed:
                rows.append(f"{row}| does not fit | | | |")
                continue
            peak, seconds = f"{step['peak_bytes'] / 2**30:.2f}", f"{step['roofline']['step']:.2f}"
            ratio = f"{speed[name] / best:.2f}" if best else ""
            rows.append(f"{row}| {peak} | {seconds} | {speed[name]:,.0f} | {ratio} |")
    return "\n".join(rows)


def _tokens_per_second(figures: dict) -> float | None:
    """Tokens a second at best; None if the step does not fit."""
    step = figures["programs"]["train"]
    return step["tokens"] / step["roofline"]["step"] if step["fits"] else None


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
