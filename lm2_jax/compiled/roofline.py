"""The least time that a program can take on a chip."""

from __future__ import annotations

import dataclasses

from lm2_jax.compiled.costs import Costs
from lm2_jax.parallel.chips import Chip


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
