"""Finiteness of a memory, and distance of bfloat16 from float32, over a long stream that is never reset.

One lane reads the run's training documents end to end as one endless document, once in each type with the same float32
weights, each in a memory of its own. A block of segments gives: the norm of slots (mean and largest), how far the two
banks are apart (norm of the difference over the norm), and the mean Kullback-Leibler divergence of the next token's
distribution, in nats. Written: OUTPUT.json and OUTPUT.png.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.storage import has_directory, to_local_path
from lm2_jax.config import Config, replace
from lm2_jax.tokenizer import load_tokenizer

BLOCK = 100  # segments read together
TYPES = ("float32", "bfloat16")


def main() -> None:
    """The command."""
    parser = parser_for(
        "measurements.numerics",
        __doc__,
        "--checkpoint runs/babilong_tiny --segments 100000 --output numerics",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN_DIR")
    parser.add_argument("--segments", type=int, default=100_000, metavar="N")
    parser.add_argument("--output", type=to_local_path, required=True, metavar="PREFIX")
    arguments = parser.parse_args()
    if arguments.segments < BLOCK:
        raise UserError(f"--segments: found {arguments.segments}; expected {BLOCK} or more")
    if not has_directory(arguments.output):
        raise UserError(f"--output: found {arguments.output}; its directory does not exist")

    from lm2_jax.loading import load_run  # imported late so that --help stays fast

    config, _, params = load_run(arguments.checkpoint)
    blocks = measure(config, params, arguments.segments)
    figures = {
        "segments": len(blocks) * BLOCK,
        "segment_length": config.trained_segment_length,
        "slots": config.memory.num_slots,
        "blocks": blocks,
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(figures) + "\n")
    draw(figures, arguments.output.with_suffix(".png"))
    print(summary(figures))


def summary(figures: dict[str, Any]) -> str:
    """The figures in one sentence."""
    blocks = figures["blocks"]
    divergence, apart = (np.array([block[key] for block in blocks]) for key in ("divergence", "apart"))
    low, high = np.quantile(divergence, 0.5), np.quantile(divergence, 0.99)
    return (
        f"{figures['segments']:,} segments, all finite; largest norm of a slot "
        f"{max(block['float32']['memory_norm_max'] for block in blocks):.2f}; bfloat16 from float32: {low:.2g} nats a "
        f"token in the median block, {high:.2g} at the 99th percentile, {divergence.max():.2g} at most; banks apart by "
        f"{np.quantile(apart, 0.5):.2%}, {np.quantile(apart, 0.99):.2%} and {apart.max():.2%}"
    )


def measure(config: Config, params: Any, segments: int) -> list[dict[str, Any]]:
    """A record a block. Raises TrainingFailed if something is not finite."""
    import jax
    import jax.numpy as jnp

    from lm2_jax.model import build_model
    from lm2_jax.segments import run_segments
    from lm2_jax.training.step import memory_norms

    models = {dtype: build_model(replace(config, train={"dtype": dtype})) for dtype in TYPES}

    @jax.jit
    def read(memories: dict[str, Any], tokens_BST: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        logits, after = {}, {}
        for dtype, model in models.items():
            logits[dtype], after[dtype] = run_segments(model, params, tokens_BST, memories[dtype])
        exact, rough = (jax.nn.log_softmax(logits[dtype]) for dtype in TYPES)
        divergence_BST = jnp.sum(jnp.exp(exact) * (exact - rough), axis=-1)
        apart = [
            jnp.sum((a - b) ** 2) / jnp.sum(a**2) for a, b in zip(*map(jax.tree.leaves, after.values()), strict=True)
        ]
        record = {dtype: memory_norms(models[dtype], memory) for dtype, memory in after.items()}
        record |= {"divergence": jnp.mean(divergence_BST), "apart": jnp.sqrt(jnp.mean(jnp.stack(apart)))}
        return after, record

    memories = {dtype: model.init_memory(1, params) for dtype, model in models.items()}
    blocks, began = [], time.monotonic()
    for number, tokens_BST in enumerate(stream(config, segments // BLOCK), 1):
        memories, record = read(memories, tokens_BST)
        blocks.append(jax.tree.map(lambda x: float(f"{x:.5g}"), record))
        if not all(np.isfinite(jax.tree.leaves(blocks[-1]))):
            raise TrainingFailed(f"not finite after {number * BLOCK} segments: {blocks[-1]}")
        if number % 100 == 0:
            left = (time.monotonic() - began) / number * (segments // BLOCK - number)
            print(f"{number * BLOCK:,} segments, {left:.0f} s left", flush=True)
    return blocks


def stream(config: Config, blocks: int) -> Iterator[np.ndarray]:
    """Tokens [1, BLOCK, T] of the run's training documents, end to end."""
    from lm2_jax.data.pipeline import Pipeline

    T = config.trained_segment_length
    tokenizer = None if config.data.source == "bin" else load_tokenizer(config.tokenizer)
    source, _ = Pipeline(config, tokenizer).sources(config.stages[-1])
    waiting, index = np.zeros(0, np.int32), 0
    for _ in range(blocks):
        while len(waiting) < BLOCK * T:
            waiting = np.concatenate([waiting, source[index % len(source)].tokens])
            index += 1
        yield waiting[: BLOCK * T].reshape(1, BLOCK, T)
        waiting = waiting[BLOCK * T :]


def draw(figures: dict[str, Any], path: Path) -> None:
    """Norms, and bfloat16 against float32, over the stream."""
    from matplotlib.figure import Figure  # imported late so that --help stays fast

    blocks = figures["blocks"]
    at = np.arange(1, len(blocks) + 1) * BLOCK
    figure = Figure((8, 6), layout="constrained")
    norms, apart = figure.subplots(2, 1, sharex=True)
    for dtype, color in zip(TYPES, ("tab:blue", "tab:orange"), strict=True):
        for key, style in (("memory_norm", "-"), ("memory_norm_max", ":")):
            label = f"{dtype}, {'largest' if key.endswith('max') else 'mean'}"
            norms.plot(at, [block[dtype][key] for block in blocks], style, color=color, lw=1, label=label)
    norms.set_ylabel("norm of a slot")
    norms.set_ylim(bottom=0)
    norms.legend(ncols=2, fontsize="small")
    norms.set_title(f"{figures['segments']:,} segments of {figures['segment_length']} tokens, never reset")
    apart.plot(at, [block["apart"] for block in blocks], lw=1, color="tab:green", label="banks, relative")
    apart.plot(at, [block["divergence"] for block in blocks], lw=1, color="tab:red", label="next token, nats (KL)")
    apart.set_yscale("log")
    apart.set_ylabel("bfloat16 from float32")
    apart.set_xlabel("segments read")
    apart.legend(fontsize="small")
    figure.savefig(path, dpi=110)


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
