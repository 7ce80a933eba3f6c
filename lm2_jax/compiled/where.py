"""The cycles of a compiled program: instructions by kind, and by the lines of this package that they come from.

The compiler says of every instruction which line of Python asked for it, in tables of stack frames before the program.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm2_jax.compiled import costs
from lm2_jax.compiled.hlo import Computation, Instruction, Program
from lm2_jax.parallel.chips import Chip

_PACKAGE = "/lm2_jax/"
_PRODUCTS = {"convolution", "dot"}
_MOVES = {"parameter", "constant", "bitcast", "copy", "transpose", "reshape", "tuple", "get-tuple-element"}


@dataclasses.dataclass
class Place:
    """Instructions of one kind, from one place in the code.

    Attributes:
      kind: product, kernel, fusion, cast, copy, or the name of a collective.
      turn: forward, recomputed (for the backward pass) or backward.
      source: line and function of this package, and where that was called: `model/layers.py:91 dense < ...`.
      count: of instructions in one run.
      cycles: XLA's estimate; of kernels, what their products take at peak.
      memory_bytes: read from and written to the chip's main memory.
    """

    kind: str
    turn: str
    source: str
    count: int = 0
    cycles: float = 0
    memory_bytes: float = 0


def where(program: Program, text: str, chip: Chip) -> list[Place]:
    """The places of a program, those with the most cycles first; `text` is what the program was parsed from."""
    frames, places = _Frames(text), {}
    for instruction, computation, times, fused in program.run():
        if fused:
            continue
        memory_bytes = costs.memory_bytes(instruction, computation, program)
        cycles = int(instruction.attribute("estimated_cycles") or 0)
        if instruction.opcode == "custom-call":
            cycles = costs.kernel_flops(instruction) / chip.flops * chip.clock
        if not (memory_bytes or cycles):
            continue
        kind, origin = _kind(instruction, program)
        key = kind, _turn(origin), frames.source(origin)
        place = places.setdefault(key, Place(*key))
        place.count += times
        place.cycles += times * cycles
        place.memory_bytes += times * memory_bytes
    return sorted(places.values(), key=lambda place: (-place.cycles, -place.memory_bytes))


def table(rows: Sequence[Mapping[str, Any]], most: int = 40) -> str:
    """The first places, each with its fields by name, as lines for people to read."""
    cycles, memory_bytes = (max(sum(row[name] for row in rows), 1) for name in ("cycles", "memory_bytes"))
    lines = [f"  {'M cycles':>9}{'%':>7}{'GB':>9}{'%':>7}{'count':>8}  {'kind':<20}{'turn':<12}from"]
    lines += [
        f"  {row['cycles'] / 1e6:>9,.1f}{row['cycles'] / cycles:>7.1%}"
        f"{row['memory_bytes'] / 1e9:>9,.2f}{row['memory_bytes'] / memory_bytes:>7.1%}"
        f"{row['count']:>8,}  {row['kind']:<20}{row['turn']:<12}{row['source']}"
        for row in rows[:most]
    ]
    return "\n".join(lines)


def _kind(instruction: Instruction, program: Program) -> tuple[str, Instruction]:
    """The kind of an instruction, and the one inside of it that says where it comes from: a product before all else."""
    if instruction.opcode != "fusion":
        kind = {"convolution": "product", "dot": "product", "custom-call": "kernel"}.get(instruction.opcode)
        return kind or instruction.opcode.removesuffix("-start"), instruction
    inside = list(_inside(program.computations[instruction.called[0]], program))
    products = [one for one in inside if one.opcode in _PRODUCTS]
    if products:
        return "product", products[0]
    opcodes = {one.opcode for one in inside} - _MOVES
    kind = "fusion" if opcodes - {"convert"} else "cast" if opcodes else "copy"
    known = [one for one in (instruction, *reversed(inside)) if one.attribute("stack_frame_id")]
    return kind, known[0] if known else instruction


def _inside(computation: Computation, program: Program) -> Iterator[Instruction]:
    for instruction in computation.instructions.values():
        yield instruction
        if instruction.opcode == "fusion":
            yield from _inside(program.computations[instruction.called[0]], program)


def _turn(instruction: Instruction) -> str:
    name = instruction.attribute("op_name") or ""
    if "rematted_computation" in name:
        return "recomputed"
    return "backward" if "transpose(" in name else "forward"


class _Frames:
    """The tables of stack frames at the head of a program's text."""

    def __init__(self, text: str) -> None:
        head = text[: text.find("\n%")]

        def rows(title: str) -> dict[int, str]:
            section = head.partition(f"\n{title}\n")[2].partition("\n\n")[0]
            return {int(number): rest for number, rest in re.findall(r"^(\d+) (.*)$", section, re.MULTILINE)}

        self._files, self._functions = rows("FileNames"), rows("FunctionNames")
        self._locations = {number: _numbers(row) for number, row in rows("FileLocations").items()}
        self._frames = {number: _numbers(row) for number, row in rows("StackFrames").items()}
        self._shift = self._frames[1]["parent_frame_id"] if self._frames else 0  # the first has no parent

    def source(self, instruction: Instruction) -> str:
        """The innermost line of this package that led to an instruction, and the line that called its function."""
        lines: list[str] = []
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        number = int(found.group(1)) if found else 0
        while number in self._frames and len(lines) < 2:
            frame = self._frames[number]
            location = self._locations[frame["file_location_id"]]
            file = self._files[location["file_name_id"]].strip('"')
            if _PACKAGE in file:
                function = self._functions[location["function_name_id"]].strip('"').rpartition("<locals>.")[2]
                line = f"{file.rpartition(_PACKAGE)[2]}:{location['line']} {function}"
                lines += [line] if line not in lines else []
            number = frame["parent_frame_id"] - self._shift
        return " < ".join(lines) or instruction.attribute("op_name") or "?"


def _numbers(row: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", row)}
