"""How the memory of a compiled training step grows with the segments of a window, for both schedules.

Nothing is run: the figures are the compiler's memory analysis (temporaries, bytes). What must be kept for the backward
pass per segment is, segment by segment, all layers' banks and one [B,T,D]; layer by layer, one layer's bank and one
[B,T,D] per layer.
"""

from __future__ import annotations

import functools

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import run_command
from lm2_jax.config import Config, parse_config

EXAMPLE = (
    "model={vocab_size: 512, d_model: 128, num_layers: 16, num_heads: 4, num_kv_heads: 4, d_ff: 512}",
    "memory={num_slots: 128, num_heads: 4}",
    "data={segment_length: 128, batch_size: 4}",
    "train={remat: full}",
)


def temporary_bytes(config: Config, segments: int) -> int:
    """Bytes of temporaries in the compiled training step for windows of `segments` segments."""
    import jax  # imported late so that --help stays fast

    from lm2_jax.model import build_model
    from lm2_jax.parallel.mesh import abstract_batch, make_mesh, use_mesh
    from lm2_jax.training.state import StepConfig, abstract_state
    from lm2_jax.training.step import make_train_step

    run = build_model(config), make_mesh(config, jax.devices()[:1]), StepConfig.of(config)
    batch = abstract_batch(run[1], config.data.batch_size, segments, config.data.segment_length, packed=False)
    with use_mesh(run[1]):
        compiled = make_train_step(*run).lower(abstract_state(*run), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def kept_bytes(config: Config, schedule: str) -> int:
    """Bytes per segment that the backward pass needs: banks (float32) and block inputs."""
    B, T, L = config.data.batch_size, config.data.segment_length, config.model.num_layers
    bank = B * config.memory.num_slots * config.spec.memory_width * 4
    tokens = B * T * config.model.d_model * (4 if config.train.dtype == "float32" else 2)
    return config.spec.num_memory_layers * bank + tokens if schedule == "segment" else bank + L * tokens


def main() -> None:
    """The command."""
    parser = parser_for("measurements.memory", __doc__, "--segments 4 8 16 32 64")
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16, 32, 64], metavar="S")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    arguments = parser.parse_args()
    print("schedule  segments  temporaries MiB  growth/segment MiB  kept/segment MiB  ratio")
    for schedule in ("segment", "layer"):
        config = parse_config("", [*EXAMPLE, f"train.schedule={schedule}", *arguments.set])
        kept, before = kept_bytes(config, schedule) / 2**20, None
        for segments in arguments.segments:
            now = temporary_bytes(config, segments) / 2**20
            line = f"{schedule:8}  {segments:8}  {now:15.2f}"
            if before is not None:
                growth = (now - before[1]) / (segments - before[0])
                line += f"  {growth:18.3f}  {kept:16.3f}  {growth / kept:5.2f}"
            print(line, flush=True)
            before = segments, now


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
