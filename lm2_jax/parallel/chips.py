"""TPU chips: their peak rates, their memory, and the names by which JAX knows them.

Figures are from the makers' documentation of each generation (docs.cloud.google.com/tpu/docs/v5e, /v6e, /v5p: system
architecture). Interconnect: half of the bidirectional bandwidth per chip. Usable memory: what the compiler of libtpu
0.0.42 lets a program have. Clock: from peak = clock · 2 · products a cycle (v5e: 4 units of 128 x 128; v5p: twice that;
v6e: 4 of 256 x 256).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one device of JAX.

    Attributes:
      flops: bfloat16 operations a second.
      memory_bandwidth: bytes a second.
      memory: usable bytes.
      interconnect: bytes a second that it can send.
      clock: cycles a second.
      kinds: values of `device_kind`, by which JAX names it.
    """

    flops: float
    memory_bandwidth: float
    memory: float
    interconnect: float
    clock: float
    kinds: tuple[str, ...]


_GIB = 2**30
CHIPS = {
    "v5e": Chip(197e12, 819e9, 15.75 * _GIB, 200e9, 1.5e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 2765e9, 95.73 * _GIB, 600e9, 1.75e9, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 1640e9, 31.24 * _GIB, 400e9, 1.75e9, ("TPU v6 lite", "TPU v6e")),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
