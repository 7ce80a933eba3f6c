"""Benchmarks the data: tokenising throughput against the bare tokenizer, crash recovery, loader throughput."""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import run_command
from lm2_jax.common.files import expand_paths
from lm2_jax.common.storage import to_local_path
from lm2_jax.config import parse_config
from lm2_jax.data.prepared import read_manifest, tokenizer_of
from lm2_jax.tokenizer import load_tokenizer

_PREPARE = [sys.executable, "-m", "lm2_jax.prepare_data"]


def main() -> None:
    """Runs the command."""
    parser = parser_for(
        "measurements.data",
        __doc__,
        "corpus --input 'books/*.txt' --output corpus.jsonl",
        "preparing --input corpus.jsonl --tokenizer books/tokenizer.json --output scratch",
        "kills --input corpus.jsonl --tokenizer books/tokenizer.json --output scratch",
        "lanes --input prepared/corpus",
    )
    what = {"corpus": make_corpus, "preparing": preparing, "kills": kills, "lanes": lanes}
    parser.add_argument("what", choices=tuple(what))
    parser.add_argument("--input", nargs="+", required=True, help="books; JSON lines; a prepared directory")
    parser.add_argument("--output", type=to_local_path, help="JSON lines to write; a new directory")
    parser.add_argument("--tokenizer", help="a tokenizer.json")
    parser.add_argument("--megabytes", type=float, default=200, help="of the corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the lanes")
    args = parser.parse_args()
    what[args.what](args)


def make_corpus(args: argparse.Namespace) -> None:
    """Writes JSON lines of random sentences from books, with some numbers and signs among them; always the same."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in expand_paths(args.input, "--input"))
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if 20 < len(sentence) < 600]
    rng, size = random.Random(0), 0
    with args.output.open("w", encoding="utf-8") as file:
        while size < args.megabytes * 1e6:
            document = " ".join(rng.choices(sentences, k=max(1, int(rng.expovariate(1 / 20)))))
            if rng.random() < 0.3:
                document += (
                    f"\n\nNo. {rng.randrange(10**6)}: {rng.random()} caf\u00e9 {chr(rng.randrange(0x4E00, 0x9000))}"
                )
            size += file.write(json.dumps({"text": document}, ensure_ascii=rng.random() < 0.5) + "\n")


# --- Preparing -----------------------------------------------------------------------------------------------------


def preparing(args: argparse.Namespace) -> None:
    """Times the command against `encode_batch` on the same texts, half of them before it and half after it."""
    (path,) = args.input
    texts = [json.loads(line)["text"] for line in Path(path).read_bytes().split(b"\n") if line]
    tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)

    def bare(part: list[str]) -> int:
        batches = (part[start : start + 4096] for start in range(0, len(part), 4096))  # an encoding takes memory
        return sum(len(one) for batch in batches for one in tokenizer.encode_batch(batch, add_special_tokens=False))

    half = len(texts) // 2
    first = _timed(lambda: bare(texts[:half]))
    ours = _timed(lambda: _prepare(args, args.output, 16).wait())
    second = _timed(lambda: bare(texts[half:]))
    text_bytes = sum(len(text.encode()) for text in texts)
    seconds, cpu_seconds = first[1] + second[1], first[2] + second[2]
    print(f"{text_bytes / 1e6:.0f} MB of text, {first[0] + second[0]:,} tokens, {args.workers} workers")
    for name, wall, cpu in (("encode_batch", seconds, cpu_seconds), ("prepare_data", *ours[1:])):
        print(
            f"  {name}: {wall:.1f} s, {text_bytes / wall / 1e6:.2f} MB/s; {text_bytes / cpu / 1e6:.2f} MB a CPU second"
        )
    print(f"  prepare_data / encode_batch: {seconds / ours[1]:.1%} by time, {cpu_seconds / ours[2]:.1%} by CPU time")


def kills(args: argparse.Namespace) -> None:
    """Kills the command at random moments, spread over its work, then lets it finish: the output must be the same."""
    whole, killed = args.output / "whole", args.output / "killed"
    _prepare(args, whole, 1).wait()
    shards, rng = len(read_manifest(whole).shards), random.Random(0)

    def made() -> int:
        return len(list(killed.glob(".progress/0*.json")))

    for number in range(args.kills):
        process, until = _prepare(args, killed, 1), shards * (number + rng.random()) / (args.kills + 1)
        while process.poll() is None and made() < until:
            time.sleep(0.01)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {number + 1}: {made()} of {shards} shards were whole", flush=True)
    _prepare(args, killed, 1).wait()
    same = subprocess.run(["diff", "-r", str(whole), str(killed)]).returncode == 0
    print(f"after {args.kills} kills: {'identical' if same else 'DIFFERENT'}")


def _prepare(args: argparse.Namespace, output: Path, shard_mb: int) -> subprocess.Popen:
    options = ["--tokenizer", args.tokenizer, "--workers", str(args.workers), "--shard-mb", str(shard_mb)]
    return subprocess.Popen([*_PREPARE, "--input", *args.input, "--output", str(output), *options])


def _timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """Returns the result, seconds, and CPU seconds of this process and of those it has waited for."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    wall, before = time.monotonic(), cpu()
    result = work()
    return result, time.monotonic() - wall, cpu() - before


# --- Lanes ---------------------------------------------------------------------------------------------------------


def lanes(args: argparse.Namespace) -> None:
    """Times the lanes of a prepared directory without a model: tokens a second, for each `boundaries`."""
    from lm2_jax.data.lanes import make_iterator  # imported late so that --help stays fast
    from lm2_jax.data.pipeline import Pipeline
    from lm2_jax.tokenizer import with_vocabulary

    (directory,) = args.input
    tokenizer = tokenizer_of(directory, read_manifest(directory, "--input"))
    for boundaries in ("segment", "packed", "stream"):
        settings = [f"data.path={directory}", "data.source=prepared", f"data.boundaries={boundaries}"]
        settings += [f"tokenizer={{kind: {tokenizer.kind}, path: {tokenizer.path or 'null'}}}"]
        settings += ["data.segment_length=2048", "data.segments_per_window=4", "data.batch_size=16", *args.set]
        config = with_vocabulary(parse_config("", settings))
        dataset = Pipeline(config, load_tokenizer(config.tokenizer)).training(config.stages[0])
        windows = make_iterator(dataset, config.data.prefetch)
        next(windows)

        def read(windows=windows) -> int:  # noqa: ANN001
            return sum(int((next(windows).document_BST > 0).sum()) for _ in range(args.windows))

        tokens, wall, cpu = _timed(read)
        windows.close()
        print(f"{boundaries}: {tokens / wall / 1e6:.1f} M tokens/s, {tokens / cpu / 1e6:.1f} M a CPU second")


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
