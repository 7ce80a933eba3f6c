"""Memory of the process and time per token while a model reads a long text.

The text is read as a prompt is, a block at a time. Resident memory is that of the process after a block, with the text
and its token ids (Linux). The last blocks are read in turns with the first ones, which a second reader reads afresh:
what else the machine does falls on both alike.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

import numpy as np

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.tokenizer import encode_long, load_text_tokenizer

BLOCK = 1000  # tokens
ROWS = 10  # of the table


def resident_mebibytes() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """The command."""
    parser = parser_for("measurements.streaming", __doc__, "--checkpoint runs/babilong_tiny --text long.txt")
    parser.add_argument("--checkpoint", required=True, metavar="PATH")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--turns", type=int, default=100, metavar="N", help="blocks at either end; default 100")
    arguments = parser.parse_args()

    from lm2_jax import decoding  # imported late so that --help stays fast
    from lm2_jax.loading import load_run

    try:
        text = Path(arguments.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: {arguments.text} cannot be read as a UTF-8 text file ({error})") from None
    config, model, params = load_run(arguments.checkpoint)
    ids = encode_long(load_text_tokenizer(config, arguments.checkpoint), text)
    blocks = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, 1, BLOCK)  # each of one row
    turns = arguments.turns
    if len(blocks) < 2 * turns + ROWS:
        raise UserError(f"--text: {arguments.text} has {len(ids):,} tokens; give more, or fewer --turns")

    def read(block: np.ndarray, state: decoding.DecodeState) -> tuple[float, decoding.DecodeState]:
        """Microseconds per token, and the state after the block."""
        began = time.perf_counter()
        logits_BV, state = decoding.read(model, params, block, state)
        logits_BV.block_until_ready()
        return 1e6 * (time.perf_counter() - began) / BLOCK, state

    state, memory = decoding.start(model, params, 1), []
    for block in blocks[:-turns]:
        _, state = read(block, state)
        memory.append(resident_mebibytes())
    early, times = decoding.start(model, params, 1), []
    for first, last in zip(blocks[:turns], blocks[-turns:], strict=True):
        at_start, early = read(first, early)
        at_end, state = read(last, state)
        times.append((at_start, at_end))
        memory.append(resident_mebibytes())

    tenth = 10_000 // BLOCK - 1
    print("tokens read  resident MiB  to that at 10,000")
    for place in sorted({tenth, *np.linspace(tenth, len(memory) - 1, ROWS).astype(int).tolist()}):
        print(f"{(place + 1) * BLOCK:11,}  {memory[place]:12.1f}  {memory[place] / memory[tenth]:17.3f}")
    at_start, at_end = np.median(times, axis=0)
    low, middle, high = np.percentile([end / start for start, end in times], (25, 50, 75))
    print(f"microseconds per token, median of {turns} blocks: {at_start:.1f} at the start, {at_end:.1f} at the end")
    print(f"end to start, turn by turn: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}")


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
