"""Shared by tests: tiny configs, training in this process and in others, and what makes two runs the same run."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest
from quick import xla_flags

from lm2_jax import generate
from lm2_jax.common.errors import run_command
from lm2_jax.common.records import read_records
from lm2_jax.config import parse_config
from lm2_jax.convert import directory, engine
from lm2_jax.evals import model as evals_model
from lm2_jax.model import build_model
from lm2_jax.training import loop

REPOSITORY = Path(__file__).resolve().parent.parent
TIMES_AND_RATES = ("time", "tokens_per_second", "step_seconds", "data_seconds", "mfu", "goodput")

# Log, validation and checkpoint steps fall apart, so that a run is stopped between any two of them.
TINY = """
model: {d_model: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, d_ff: 32}
memory: {kind: lm2, num_slots: 4, num_heads: 2}
data: {source: stories, segment_length: 16, segments_per_window: 2, batch_size: 4}
tokenizer: {kind: stories}
optim: {warmup_steps: 2}
train:
  log_every: 2
  curriculum:
    - {segments: 1, segment_length: 16, steps: 9, advance_accuracy: 0.02}
    - {segments: 2, segment_length: 16}
eval: {every_steps: 12, windows: 1, lengths: [2], questions: 4}
checkpoint: {every_steps: 5, keep: 2}
"""


def tiny_config(run_dir, *overrides):
    """A run of seconds; overrides are written as for --set."""
    return parse_config(TINY, [f"train.run_dir={run_dir}", "train.steps=20", *overrides], where="tests")


def short_config(run_dir, *overrides):
    """A run of one stage and 12 steps that ends with checkpoints 8 and 12; fixture `whole` has it done."""
    return tiny_config(
        run_dir,
        "train.curriculum=[]",
        "data.segments_per_window=1",
        "train.steps=12",
        "checkpoint.every_steps=4",
        "train.max_skipped_steps=6",
        *overrides,
    )


def text_overrides(path, boundaries):
    """Overrides for a text that is written to `path`: documents of uneven length, some longer than a window."""
    rng = np.random.default_rng(0)
    words = ("the", "memory", "slots", "keep", "what", "a", "segment", "said", "and", "forget", "nobody", "asks")
    documents = [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(40)]
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return (
        "data.source=text",
        f"data.path={path}",
        r'data.document_separator="\n\n"',
        f"data.boundaries={boundaries}",
        "tokenizer.kind=bytes",
        "train.curriculum=[{segments: 1, segment_length: 16, steps: 9}, {segments: 2, segment_length: 16}]",
    )


def run_generate(monkeypatch, capsys, checkpoint, *arguments):
    """Runs the command `generate` in this process; its exit code, and what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["generate", "--checkpoint", str(checkpoint), *arguments])
    code = 0
    try:
        run_command(generate.main)
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


# --- What makes two runs the same -----------------------------------------------------------------------------------


def assert_same_run(run_dir, expected_dir, *, note=""):
    """To the bit: metrics but times and rates, no step missing or doubled, summary, the last checkpoint."""
    records, expected = (read_records(Path(path) / "metrics.jsonl") for path in (run_dir, expected_dir))
    assert [r["step"] for r in records] == list(range(1, expected[-1]["step"] + 1)), note
    for record, other in zip(records, expected, strict=True):
        assert _without_times(record) == _without_times(other), note
    summary, expected = (json.loads((Path(path) / "summary.json").read_text()) for path in (run_dir, expected_dir))
    assert summary == expected, note
    assert_same_checkpoint(newest_checkpoint(run_dir), newest_checkpoint(expected_dir))


def assert_same_checkpoint(path, expected_path):
    """Equal step, arrays and progress."""
    assert path.name == expected_path.name
    progress, expected = (json.loads((p / "progress" / "metadata").read_text()) for p in (path, expected_path))
    assert progress == expected
    for item in ("params", "training"):
        arrays, expected = (read_arrays(p / item) for p in (path, expected_path))
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            assert array.dtype == expected[name].dtype
            assert array.tobytes() == expected[name].tobytes(), name


def read_arrays(item):
    """Name -> array of a checkpoint's item, read without lm2_jax."""
    handler = ocp.PyTreeCheckpointHandler()
    shapes = handler.metadata(item).tree
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = handler.restore(item, args=ocp.args.PyTreeRestore(restore_args=arguments))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def checkpoint_steps(run_dir):
    """The steps that have a complete checkpoint, ascending."""
    return sorted(int(path.name) for path in (Path(run_dir) / "checkpoints").glob("*") if path.name.isdigit())


def newest_checkpoint(run_dir):
    return Path(run_dir) / "checkpoints" / str(checkpoint_steps(run_dir)[-1])


def _without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES_AND_RATES}


# --- Training in this process ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def quick_training():
    """Within it, train() uses one of the fake devices."""
    with _one_device(loop):
        yield


@contextlib.contextmanager
def on_one_device():
    """Within it, evaluations use one of the fake devices."""
    with _one_device(evals_model):
        yield


@contextlib.contextmanager
def _one_device(module):
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_mesh = module.make_mesh
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


def own_lines(stderr):
    """Without what Grain and XLA say of JAX 0.10.0: that workers are not profiled, how code was compiled."""
    return re.sub(r"(?m)^(WARNING:absl:Grain |[EW]\d{4} .*cpu_aot_loader).*\n", "", stderr)


def random_params(model, noise, seed=0):
    """Parameters away from their initialisation, where gates are constant and biases 0."""
    leaves, tree = jax.tree.flatten(jax.jit(model.init_params)(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + noise * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def random_checkpoint(path, *overrides, noise=0.3):
    """A converted directory, which loads like a run, of a tiny model away from its initialisation."""
    config = parse_config(TINY, ["train.curriculum=[]", "model.vocab_size=258", "tokenizer.kind=bytes", *overrides])
    params = random_params(build_model(config), noise)
    with directory.new_directory(Path(path)) as partial:
        directory.write(engine.Checkpoint(config, engine.from_arrays(params, path)), partial, lambda items, _: items)
    return path


def assert_drawn(path):
    """A PNG with something in every quarter, some of it in colour: frames and letters are grey, curves and maps not."""
    pixels = matplotlib.image.imread(path)[..., :3]
    H, W = pixels.shape[0] // 2, pixels.shape[1] // 2
    for quarter in (pixels[:H, :W], pixels[:H, W:], pixels[H:, :W], pixels[H:, W:]):
        assert (quarter < 0.9).any(), f"{path} is blank in a quarter"
    assert (np.ptp(pixels, axis=-1) > 0.2).any(), f"{path} has frames, and nothing in them"


# --- Training in another process ------------------------------------------------------------------------------------

# Tells when a restore begins, which cannot be seen from outside.
_COMMAND = """
import sys
from lm2_jax.checkpoint.manager import Checkpoints
from lm2_jax.common.errors import run_command
from lm2_jax.train import main
restore = Checkpoints.restore
def announce(self, step, *rest):
    print(f"restoring {step}", flush=True)
    return restore(self, step, *rest)
Checkpoints.restore = announce
run_command(main)
"""


class Run:
    """`python -m lm2_jax.train` in a process of its own. Its output goes to `log`. Cold: it compiles all."""

    def __init__(
        self,
        config_file,
        run_dir,
        *arguments,
        cold=False,
        announce_restore=False,
        log=None,
        environment=(),
    ):
        self.run_dir, self.log = Path(run_dir), Path(log or f"{run_dir}.log")
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=1), **dict(environment)}
        if cold:
            environment["JAX_COMPILATION_CACHE_DIR"] = ""
        entry = ["-c", _COMMAND] if announce_restore else ["-m", "lm2_jax.train"]
        self.started = time.time()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *entry, "--config", str(config_file), *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until(self, reached, *, seconds=300):
        """Polls `reached(self)` every millisecond. Fails if the process ends first or the time is over."""
        limit = time.monotonic() + seconds
        while not reached(self):
            assert self.process.poll() is None, f"the run ended first:\n{self.output()}"
            assert time.monotonic() < limit, f"not reached in {seconds} s:\n{self.output()}"
            time.sleep(0.001)

    def kill(self):
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def finish(self, *, seconds=600, code=0):
        """Waits for the process to end by itself, as it should."""
        try:
            assert self.process.wait(seconds) == code, self.output()
        finally:
            self.kill()

    def output(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def logged_step(self):
        """The newest step in metrics.jsonl; 0 if there is none."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_bytes().split(b"\n")
            return json.loads(lines[-2])["step"] if len(lines) > 1 else 0
        except FileNotFoundError:
            return 0

    def saves_under_way(self):
        """Names of incomplete checkpoints that this process began (an earlier one may have left some)."""
        names = []
        for path in (self.run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            try:
                if path.stat().st_ctime >= self.started:
                    names.append(path.name)
            except FileNotFoundError:
                pass  # complete by now
        return names

    def situation(self):
        """One line on what a killed process left."""
        saves = [p.name for p in (self.run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
        return f"logged to step {self.logged_step()}, checkpoints {checkpoint_steps(self.run_dir)}, incomplete {saves}"


def interruptible(command):
    """The command, for a process that SIGINT reaches even if it is ignored here, as in a job in the background."""
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", start, *command]
