"""TPU chips, and the least time that a program can take on one.

Figures are from the makers' documentation of each generation (docs.cloud.google.com/tpu/docs/v5e, /v6e, /v5p: system
architecture). Interconnect: half of the bidirectional bandwidth per chip. Usable memory: what the compiler of libtpu
0.0.42 lets a program have. Clock: from peak = clock · 2 · products a cycle (v5e: 4 units of 128 x 128; v5p: twice that;
v6e: 4 of 256 x 256).
"""

from __future__ import annotations

import dataclasses

from lm2_jax.compiled.costs import Costs


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      flops: bfloat16 operations a second.
      memory_bandwidth: bytes a second.
      memory: usable bytes.
      interconnect: bytes a second that it can send.
      clock: cycles a second.
    """

    flops: float
    memory_bandwidth: float
    memory: float
    interconnect: float
    clock: float


_GIB = 2**30
CHIPS = {
    "v5e": Chip(197e12, 819e9, 15.75 * _GIB, 200e9, 1.5e9),
    "v5p": Chip(459e12, 2765e9, 95.73 * _GIB, 600e9, 1.75e9),
    "v6e": Chip(918e12, 1640e9, 31.24 * _GIB, 400e9, 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds that each part of a step takes by itself, and what follows from the longest.

    Attributes:
      compute: matrix products, kernels included, at peak.
      memory: traffic with main memory.
      interconnect: bytes sent to other chips.
      scheduled: XLA's estimate of cycles, and kernels at peak.
      binds: the longest of the first three.
      step: no step is shorter; the longest of all four.
      mfu: model FLOPs (6 · parameters · tokens) over what the chip could do in `step`: an upper bound.
    """

    compute: float
    memory: float
    interconnect: float
    scheduled: float
    binds: str
    step: float
    mfu: float


def roofline(costs: Costs, chip: Chip, model_flops: float) -> Roofline:
    """The roofline of a program on a chip. model_flops: per chip and step."""
    seconds = {
        "compute": (costs.matmul_flops + costs.kernel_flops) / chip.flops,
        "memory": costs.memory_bytes / chip.memory_bandwidth,
        "interconnect": costs.wire_bytes / chip.interconnect,
    }
    scheduled = costs.cycles / chip.clock + costs.kernel_flops / chip.flops
    step = max(scheduled, *seconds.values())
    binds = max(seconds, key=seconds.__getitem__)
    return Roofline(**seconds, scheduled=scheduled, binds=binds, step=step, mfu=model_flops / chip.flops / step)
