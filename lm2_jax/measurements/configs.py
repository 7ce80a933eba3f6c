"""Compiles every config for the topology that its comment names, and tables the figures.

Each config is compiled by `python -m lm2_jax.aot` in a process of its own, and its figures are kept as
OUTPUT/NAME.json; what is there already is not compiled again. A line `# Topology: v5e:4x4.` in a config names its
topology.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.storage import to_local_path
from lm2_jax.config import SHIPPED


def main() -> None:
    """The command."""
    parser = parser_for("measurements.configs", __doc__, "--output docs/results/compiled")
    parser.add_argument(
        "--output", type=to_local_path, required=True, metavar="DIRECTORY", help="where figures are kept"
    )
    parser.add_argument(
        "--configs", type=to_local_path, default=SHIPPED, metavar="DIRECTORY", help="default: the shipped"
    )
    arguments = parser.parse_args()
    configs = {path: topology_of(path) for path in sorted(arguments.configs.glob("*.yaml"))}
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, (path, topology) in enumerate(configs.items(), 1):
        output = (arguments.output / f"{path.stem}.json").absolute()
        if not output.exists():
            print(f"{number}/{len(configs)} {path.stem} for {topology}", flush=True)
            command = [sys.executable, "-m", "lm2_jax.aot", "--config", str(path.absolute()), "--topology", topology]
            done = subprocess.run([*command, "--output", str(output)], stdout=subprocess.DEVNULL)
            failed += [path.stem] if done.returncode else []
    print(table(arguments.output))
    if failed:
        raise TrainingFailed(f"not compiled, or too large: {', '.join(failed)}")


def topology_of(path: Path) -> str:
    """The topology in a config's comment. Raises UserError if there is none."""
    found = re.search(r"^#.*Topology: (\S+?)[.,]?(\s|$)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise UserError(f"{path}: no comment names its topology; add a line such as '# Topology: v5e:4x4.'")
    return found.group(1)


def table(directory: Path) -> str:
    """The train steps of all figures in a directory, in Markdown."""
    rows = [
        "| config | topology | parameters | tokens | peak GiB | TFLOP (of 6ND) | M cycles | sent GB | MFU bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(directory.glob("*.json")):
        figures = json.loads(path.read_text())
        step = figures["programs"]["train"]
        slices = f" x {figures['slices']}" if figures["slices"] > 1 else ""
        where = f"| {path.stem} | {figures['topology']}{slices} "
        if not step["fits"]:
            rows.append(f"{where}| {figures['parameters'] / 1e6:,.0f} M | | does not fit | | | | |")
            continue
        flops = step["matmul_flops"]
        rows.append(
            f"{where}| {figures['parameters'] / 1e6:,.0f} M | {step['tokens']:,} | {step['peak_bytes'] / 2**30:.2f} "
            f"| {flops / 1e12:.1f} ({flops / step['model_flops']:.2f}) | {step['cycles'] / 1e6:,.0f} "
            f"| {step['wire_bytes'] / 1e9:.2f} | {step['roofline']['mfu']:.0%} |"
        )
    return "\n".join(rows)


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
