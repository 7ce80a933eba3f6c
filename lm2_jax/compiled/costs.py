"""Costs of one run of a compiled program: matrix products, traffic, and XLA's estimate of cycles.

All figures are per chip, count every loop iteration (hlo.py), and are the same for every compilation by the same
versions of jax, jaxlib and libtpu.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable

import numpy as np

from lm2_jax.compiled import hlo
from lm2_jax.compiled.hlo import Computation, Instruction, Program

_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip


_SLICES = ("dynamic-slice", "slice", "gather")
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> the operand that is written into the first


@dataclasses.dataclass
class Collective:
    """All collectives of a kind over the same mesh axes.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, ...
      axis: mesh axes that a group lies along, joined by +.
      count: in one run.
      wire_bytes: bytes that one chip sends for them.
      largest_bytes: of one array, whole.
      in_loop_bytes: the largest one inside a loop.
    """

    kind: str
    axis: str
    count: int = 0
    wire_bytes: float = 0
    largest_bytes: int = 0
    in_loop_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one run, per chip.

    Attributes:
      matmul_flops: FLOPs of dots and convolutions, two per multiply-add.
      kernel_flops: FLOPs of the products in attention kernels, without tiles that a causal mask rules out.
      kernel_calls: number of kernel runs.
      cycles: XLA's own estimate, summed over fusions; kernels and waiting for the network are not in it.
      memory_bytes: bytes read from and written to the chip's main memory.
      copy_bytes: bytes written by copies.
      collectives: by kind and axis.
    """

    matmul_flops: float
    kernel_flops: float
    kernel_calls: int
    cycles: float
    memory_bytes: float
    copy_bytes: float
    collectives: list[Collective]

    @property
    def wire_bytes(self) -> float:
        """Bytes that one chip sends."""
        return sum(c.wire_bytes for c in self.collectives)


def count(program: Program, mesh_shape: dict[str, int]) -> Costs:
    """Adds up the costs of a program. mesh_shape: axis name to size, in the order that devices are numbered in."""
    flops = of_kernels = cycles = traffic = copies = 0.0
    calls = 0
    sent: dict[str, tuple[Instruction, Computation, int]] = {}
    for instruction, computation, times, fused in program.run():
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in ("convolution", "dot"):
            flops += times * matmul_flops(instruction, computation)
        elif opcode in _COLLECTIVES:
            # A collective that overlaps with products appears in several fusions with the same channel id
            channel = instruction.attribute("channel_id") if fused else None
            channel = f"{opcode} {channel}" if channel else f"{computation.name} {instruction.name}"
            if channel not in sent or times > sent[channel][2]:
                sent[channel] = (instruction, computation, times)
        elif opcode == "custom-call" and instruction.attribute("custom_call_target") == "tpu_custom_call":
            calls += times
            of_kernels += times * kernel_flops(instruction)
        if not fused:
            cycles += times * int(instruction.attribute("estimated_cycles") or 0)
            traffic += times * memory_bytes(instruction, computation, program)
            copies += times * hlo.size_in_bytes(instruction.type) if instruction.opcode == "copy" else 0
    collectives = _collectives(sent.values(), mesh_shape)
    return Costs(flops, of_kernels, calls, cycles, traffic, copies, collectives)


# --- Matrix products -----------------------------------------------------------------------------------------------


def matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """2 · multiplications of a dot, or of a convolution, which is what dots are made into for TPUs."""
    (_, result), *_ = hlo.arrays(instruction.type)
    left, right = (_shape(computation, name) for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes).group(1)
        return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, result_labels = labels.groups()
    window = _window(instruction.attributes)
    spatial = 1
    for number, size in enumerate(window["size"]):
        axis = str(number)
        spatial *= _pairs(
            left[left_labels.index(axis)],
            result[result_labels.index(axis)],
            size,
            window["stride"][number],
            window["pad"][number],
            window["lhs_dilate"][number],
            window["rhs_dilate"][number],
        )
    batch, features = result[result_labels.index("b")], result[result_labels.index("f")]
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * spatial * batch * features * right[right_labels.index("i")] / batch_groups


def _shape(computation: Computation, name: str) -> tuple[int, ...]:
    return hlo.arrays(computation.instructions[name].type)[0][1]


def _window(attributes: str) -> dict[str, list]:
    """size, stride, pad (before, after), and dilations of a convolution, one for every spatial axis."""
    written = re.search(r"window=\{([^}]*)\}", attributes)
    values = dict(part.split("=") for part in written.group(1).split()) if written else {}
    sizes = [int(n) for n in values.get("size", "").split("x") if n]
    window: dict[str, list] = {"size": sizes}
    for name in ("stride", "lhs_dilate", "rhs_dilate"):
        window[name] = [int(n) for n in values[name].split("x")] if name in values else [1] * len(sizes)
    pads = values.get("pad", "x".join(["0_0"] * len(sizes))).split("x")
    window["pad"] = [tuple(int(n) for n in pad.split("_")) for pad in pads if pad]
    return window


def _pairs(
    size_in: int, size_out: int, kernel: int, stride: int, pad: tuple[int, int], dilate_in: int, dilate_kernel: int
) -> int:
    """Number of (output, kernel) positions that read an input element, not padding or a dilation gap."""
    if kernel == 1 and pad == (0, 0) and dilate_in == 1:
        return size_out
    index = np.arange(size_out)[:, None] * stride + np.arange(kernel)[None] * dilate_kernel - pad[0]
    return int(np.sum((index >= 0) & (index < (size_in - 1) * dilate_in + 1) & (index % dilate_in == 0)))


# --- Kernels and memory --------------------------------------------------------------------------------------------


def kernel_flops(kernel: Instruction) -> float:
    """Matrix products of JAX's splash attention, q [.., heads, T, K] against k [.., U, K]; 0 for other kernels.

    They are two forward, three for the gradient of q, and four for those of k and v.
    """
    name = kernel.name.split(".")[0]
    products = {"fwd": 2, "dq": 3, "dkv": 4}.get(next(iter(re.findall(r"_(fwd|dq|dkv)_", f"{name}_")), ""), 0)
    if not (products and name.startswith("splash")):
        return 0.0
    shapes = hlo.arrays(re.search(r"operand_layout_constraints=\{(.*?\})\}", kernel.attributes).group(1))
    q, k = [shape for dtype, shape in shapes if dtype in ("bf16", "f32")][:2]
    *_, of_queries, of_keys = next(shape for dtype, shape in shapes if dtype.startswith("s") and len(shape) == 3)
    visited = {
        "causal_attention": (of_keys + 1) / (2 * of_keys),
        "half_attention": 1 / 2,
        "either_attention": (of_queries + 1) / (2 * of_queries),  # at most: one tile of queries needs both
    }
    share = next((share for scope, share in visited.items() if scope in kernel.attributes), 1.0)
    return 2.0 * products * math.prod(q) * k[-2] * share


_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "copy-done", "slice-done", "opt-barrier",
}  # fmt: skip


def memory_bytes(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Bytes that an instruction reads from and writes to main memory; an array only sliced counts as its slices."""
    if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith("-done"):
        return 0.0
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if instruction.opcode in _SLICES:
        return 2.0 * hlo.size_in_bytes(instruction.type, True)
    if instruction.opcode in _IN_PLACE:
        return 2.0 * hlo.size_in_bytes(operands[_IN_PLACE[instruction.opcode]].type, True)
    if instruction.opcode == "copy-start":  # its type lists both ends
        return float(hlo.size_in_bytes(instruction.type, True))
    if instruction.opcode == "slice-start":  # its type lists the whole source, in brackets, and the slice
        _, _, taken = instruction.type.partition("), ")
        return float(hlo.size_in_bytes(taken) + hlo.size_in_bytes(taken, True))
    read = [hlo.size_in_bytes(operand.type, True) for operand in operands]
    written = hlo.size_in_bytes(instruction.type, True)
    if instruction.opcode == "fusion":
        body = program.computations[instruction.called[0]]
        for parameter in body.instructions.values():
            if parameter.opcode != "parameter" or not read[int(parameter.arguments)]:
                continue
            users = [user for user in body.instructions.values() if parameter.name in user.operands]
            updates = [user for user in users if user.opcode in _IN_PLACE and user.operands[0] == parameter.name]
            sliced = _sliced_bytes(parameter, body, program)
            if sliced is not None:
                read[int(parameter.arguments)] = sliced
            elif updates and updates == users:  # in place
                new = (body.instructions[user.operands[_IN_PLACE[user.opcode]]] for user in updates)
                size = sum(hlo.size_in_bytes(update.type) for update in new)
                written += size - read[int(parameter.arguments)]
                read[int(parameter.arguments)] = 0
    return float(sum(read) + max(written, 0))


def _sliced_bytes(array: Instruction, body: Computation, program: Program) -> int | None:
    """Bytes that a fusion, or one inside it, reads of an array that it only slices; None if it reads all."""
    total, users = 0, [user for user in body.instructions.values() if array.name in user.operands]
    for user in users:
        if user.opcode in _SLICES and user.operands[0] == array.name:
            total += hlo.size_in_bytes(user.type)
            continue
        if user.opcode != "fusion" or user.operands.count(array.name) > 1:
            return None
        inner = program.computations[user.called[0]]
        number = str(user.operands.index(array.name))
        parameter = next(p for p in inner.instructions.values() if p.opcode == "parameter" and p.arguments == number)
        sliced = _sliced_bytes(parameter, inner, program)
        if sliced is None:
            return None
        total += sliced
    return total if users else None


# --- Collectives ---------------------------------------------------------------------------------------------------


def _collectives(sent: Iterable[tuple[Instruction, Computation, int]], mesh_shape: dict[str, int]) -> list[Collective]:
    sums: dict[tuple[str, str], Collective] = {}
    for instruction, computation, times in sent:
        kind = instruction.opcode.removesuffix("-start")
        groups = device_groups(instruction.attributes, math.prod(mesh_shape.values()))
        operands = sum(hlo.size_in_bytes(computation.instructions[name].type) for name in instruction.operands)
        size = max(len(groups[0]), 1)
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:  # each chip keeps its part only
            kind = "reduce-scatter"
        whole = operands * size if kind == "all-gather" else operands
        passes = {"all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0}.get(kind, (size - 1) / size)
        axis = mesh_axes(groups, mesh_shape)
        total = sums.setdefault((kind, axis), Collective(kind, axis))
        total.count += times
        total.wire_bytes += times * whole * passes
        total.largest_bytes = max(total.largest_bytes, whole)
        if times > 1:
            total.in_loop_bytes = max(total.in_loop_bytes, whole)
    return sorted(sums.values(), key=lambda c: -c.wire_bytes)


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """Device numbers of each group of a collective; of a permutation, (source, target)."""
    everyone = [list(range(devices))]
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))] or everyone
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh.group(2))]
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        last = np.moveaxis(numbers, along, range(-len(along), 0))
        return last.reshape(-1, math.prod(numbers.shape[a] for a in along)).tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        rows, columns, shape, order = iota.groups()
        numbers = np.arange(int(rows) * int(columns)).reshape([int(n) for n in shape.split(",")])
        if order:
            numbers = numbers.transpose([int(n) for n in order.split(",")])
        return numbers.reshape(int(rows), int(columns)).tolist()
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    return everyone


def mesh_axes(groups: list[list[int]], mesh_shape: dict[str, int]) -> str:
    """The mesh axes, joined by +, along which groups of devices lie."""
    members = itertools.chain.from_iterable(itertools.pairwise(group) for group in groups)
    differ: set[str] = set()
    for one, other in members:
        indices = (np.unravel_index(device, tuple(mesh_shape.values())) for device in (one, other))
        differ |= {name for name, a, b in zip(mesh_shape, *indices, strict=True) if a != b}
    return "+".join(name for name in mesh_shape if name in differ) or "none"
