"""The arguments of the commands. No jax here: --help and mistakes are answered at once.

A command's `main` parses its arguments first, and then imports what it works with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm2_jax.common.storage import to_path

EVALUATION_TASKS = ("perplexity", "babilong", "mmlu", "harness")

_CONFIG = "a YAML config, or the name of one that comes along, such as lm2_125m"
_CHECKPOINT = "a run directory, one of its checkpoints, or a converted one"


def parser_for(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends in examples, each a command line after `python -m lm2_jax.COMMAND`.

    A command that is called by the name of its script, such as lm2-train, calls itself so.
    """
    script = Path(sys.argv[0]).name
    program = script if script.startswith("lm2-") else f"python -m lm2_jax.{command}"
    return argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="\n".join(["examples:", *(f"  {program} {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --set."""
    parser.add_argument("--config", required=True, metavar="FILE_OR_NAME", help=_CONFIG)
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Adds --set."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, such as train.steps=100; repeatable (docs/configuration.md lists all keys)",
    )


def train_arguments() -> argparse.Namespace:
    """Parses the arguments of lm2_jax.train."""
    parser = parser_for(
        "train",
        "Train a model. A run directory (train.run_dir) that holds a checkpoint is resumed; Ctrl-C saves first.",
        "--config configs/babilong_tiny.yaml",
        "--config configs/babilong_tiny.yaml --set memory.kind=none --set train.run_dir=runs/none",
        "--config configs/lm2_1b7.yaml --explain-sharding",
        "--verify runs/babilong_tiny",
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--config", metavar="FILE_OR_NAME", help=_CONFIG)
    wanted.add_argument("--verify", type=to_path, metavar="RUN_DIR", help="check a run directory without changing it")
    add_set(parser)
    parser.add_argument("--explain-sharding", action="store_true", help="show how arrays are sharded, and stop")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of several processes: on a TPU pod, or as set by JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    return parser.parse_args()


def evaluate_arguments() -> argparse.Namespace:
    """Parses the arguments of lm2_jax.evaluate."""
    parser = parser_for(
        "evaluate",
        "Measure a model. With --output, finished work is kept, and the same command resumes there.",
        "--checkpoint runs/books --task perplexity --set 'eval.perplexity.path=books/*.txt' --output books.json",
        "--checkpoint runs/babilong_tiny --task babilong --set eval.babilong.prompt=plain "
        "--set 'eval.babilong.lengths=[0k, 1k, 4k]'",
        "--checkpoint my_llama --task mmlu --set eval.mmlu.path=mmlu",
        "--checkpoint my_llama --task harness --set 'eval.harness.tasks=[arc_easy, lambada_openai]'",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help=_CHECKPOINT)
    parser.add_argument(
        "--task",
        required=True,
        choices=EVALUATION_TASKS,
        help="what to measure; settings are eval.TASK (see docs/configuration.md)",
    )
    add_set(parser)
    parser.add_argument("--output", type=to_path, metavar="FILE.json", help="write the result, and pictures next to it")
    return parser.parse_args()


def generate_arguments() -> argparse.Namespace:
    """Parses the arguments of lm2_jax.generate."""
    parser = parser_for(
        "generate",
        "Continue a text. A prompt of any length streams through memory, a segment at a time.",
        '--checkpoint runs/books --prompt "Call me" --temperature 0.8 --top-p 0.95',
        "--checkpoint runs/books --prompt-file book.txt --max-new-tokens 0 --save-memory book.safetensors",
        '--checkpoint runs/books --load-memory book.safetensors --prompt "Who is Ahab?" --stop .',
        '--checkpoint my_instruct --chat --prompt "What is the capital of France?"',
        "--checkpoint runs/books --prompts questions.txt --rows 16",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help=_CHECKPOINT)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 file with the text to continue")
    prompt.add_argument(
        "--prompts", metavar="FILE", help="UTF-8 file with a prompt a line; prints a JSON object for each"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="how many of --prompts are continued together; default 8")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128; 0: only read")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template, as a user's"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="0: the most likely token, the default unless the model's generation_config.json samples",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens of probability P")
    parser.add_argument("--stop", action="append", default=[], metavar="STRING", help="end before this; repeatable")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default 0")
    parser.add_argument("--save-memory", metavar="FILE", help="save the memory after the last token as safetensors")
    parser.add_argument("--load-memory", metavar="FILE", help="start from saved memory; the prompt continues its text")
    arguments = parser.parse_args()
    if "" in arguments.stop:
        parser.error("argument --stop: an empty string occurs everywhere")
    if arguments.prompts is not None and (arguments.stop or arguments.load_memory or arguments.save_memory):
        parser.error("argument --prompts: not allowed with --stop, --load-memory or --save-memory")
    if arguments.prompts is None and arguments.rows is not None:
        parser.error("argument --rows: only with --prompts")
    if arguments.rows is not None and arguments.rows < 1:
        parser.error("argument --rows: expected 1 or more")
    return arguments


def aot_arguments() -> argparse.Namespace:
    """Parses the arguments of lm2_jax.aot."""
    parser = parser_for(
        "aot",
        "Compile the train step and the decode step for a TPU topology, on any Linux machine.",
        "--config configs/lm2_1b7.yaml --topology v5e:4x4 --set data.segments_per_window=16 --output lm2_1b7.json",
        "--config configs/lm2_1b7.yaml --topology v5e:4x4 --explain-sharding",
        "--config configs/lm2_1b7.yaml --topology v5e:4x4 --slices 2 --set mesh.data=2 --set data.batch_size=32",
    )
    add_config(parser)
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:1x1 to 16x16, v6e:4x4, v5p:2x2x1, ...")
    parser.add_argument("--slices", type=int, default=1, help="number of slices, joined by the data-centre network")
    parser.add_argument("--program", choices=("train", "decode", "both"), default="both", help="default both")
    parser.add_argument("--output", type=to_path, metavar="FILE.json", help="write the figures")
    parser.add_argument("--hlo", type=to_path, metavar="DIRECTORY", help="keep the optimised programs as text")
    parser.add_argument("--where", action="store_true", help="show which lines of the code the cycles go to")
    parser.add_argument("--explain-sharding", action="store_true", help="show how arrays are sharded, and stop")
    parser.add_argument("--explain-remat", action="store_true", help="compile what train.remat: auto tries, and stop")
    return parser.parse_args()


def bench_arguments() -> argparse.Namespace:
    """Parses the arguments of lm2_jax.bench."""
    parser = parser_for(
        "bench",
        "Measure training and decoding here: lm2 against none and rmt, both schedules, and how the cost grows with "
        "segments, slots and context.",
        "--config configs/babilong_tiny.yaml --output bench.json",
        "--config configs/lm2_125m.yaml --set data.batch_size=4 --only decoding",
        "--config configs/books.yaml --against transformers",
    )
    add_config(parser)
    parser.add_argument(
        "--against", choices=("transformers",), help="compare the config's Llama, without memory, with this library's"
    )
    parser.add_argument("--output", type=to_path, metavar="FILE.json", help="write the figures")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="runs of every program, in turns; default 5")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the tables whose titles contain this text")
    return parser.parse_args()
