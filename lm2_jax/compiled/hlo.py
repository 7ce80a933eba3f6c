"""Reads a compiled program: the text of optimised HLO, every instruction with how often a step runs it.

XLA's own cost_analysis counts a loop's body once. Here loops are followed: a trip count is found by running the loop's
condition on its counter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred|token|opaque)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))")
_MOST_TRIPS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      type: of the result, as written: bf16[4,2048]{1,0:T(8,128)} or a tuple of such.
      opcode: fusion, convolution, all-gather-start, while, ...
      arguments: what stands between the parentheses.
      attributes: what follows them.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions it takes."""
        return tuple(re.findall(r"%([\w.-]+)", self.arguments))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += re.findall(r"%([\w.-]+)", ",".join(branches))
        return tuple(names)

    def attribute(self, name: str) -> str | None:
        """The value of `name=value` or `"name":"value"`, up to a comma, a quote or a blank; None without it."""
        found = re.search(rf'\b{name}"?[=:]"?([^\s,"]+)', self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the root is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a module, and the one that is run."""

    computations: dict[str, Computation]
    entry: Computation

    def run(self) -> Iterator[tuple[Instruction, Computation, int, bool]]:
        """Every instruction, where it stands, how often a run of the program reaches it, and whether in a fusion.

        Every branch of a conditional is counted. Raises ValueError for a loop whose trips cannot be determined.
        """
        yield from self._run(self.entry, 1, False)

    def _run(
        self, computation: Computation, times: int, fused: bool
    ) -> Iterator[tuple[Instruction, Computation, int, bool]]:
        for instruction in computation.instructions.values():
            yield instruction, computation, times, fused
            if instruction.opcode == "while":
                body, _ = self.loop(instruction)
                trips = self.trips(instruction, computation)
                yield from self._run(body, times * trips, fused)
            elif instruction.opcode == "fusion" or "-start" in instruction.opcode:
                for name in instruction.called:
                    yield from self._run(self.computations[name], times, fused or instruction.opcode == "fusion")
            elif instruction.opcode in ("call", "conditional"):
                for name in instruction.called:
                    yield from self._run(self.computations[name], times, fused)

    def loop(self, loop: Instruction) -> tuple[Computation, Computation]:
        """Body and condition of a while."""
        names = dict(re.findall(r"\b(body|condition)=%?([\w.-]+)", loop.attributes))
        return self.computations[names["body"]], self.computations[names["condition"]]

    def trips(self, loop: Instruction, around: Computation) -> int:
        """Number of runs of a loop's body, found by evaluating its condition on successive values of its counter."""
        body, condition = self.loop(loop)
        counter = self._counter(condition)
        if counter is None:
            raise ValueError(f"loop {loop.name}: its condition does not depend on exactly one counter")
        value = self._evaluate(self._element(around, loop.operands[0], counter), around, {})
        step = self._element(body, body.root.name, counter)
        for trips in range(_MOST_TRIPS):
            if not self._evaluate(condition.root, condition, {counter: value}):
                return trips
            value = self._evaluate(step, body, {counter: value})
        raise ValueError(f"loop {loop.name}: more than {_MOST_TRIPS} trips")

    def _counter(self, condition: Computation) -> int | None:
        """Index of the element of the loop's tuple that its condition reads; None if it reads several."""
        indices = {
            int(i.attribute("index")) for i in condition.instructions.values() if i.opcode == "get-tuple-element"
        }
        return indices.pop() if len(indices) == 1 else None

    def _element(self, computation: Computation, name: str, index: int) -> Instruction:
        """The instruction that is element `index` of the tuple `name`."""
        instruction = computation.instructions[name]
        if instruction.opcode == "tuple":
            return computation.instructions[instruction.operands[index]]
        if instruction.opcode in ("copy", "opt-barrier", "bitcast"):
            return self._element(computation, instruction.operands[0], index)
        if instruction.opcode == "while":  # an element that the loop hands on unchanged
            body, _ = self.loop(instruction)
            kept = self._element(body, body.root.name, index)
            if kept.opcode == "get-tuple-element" and int(kept.attribute("index")) == index:
                return self._element(computation, instruction.operands[0], index)
        raise ValueError(f"{name} of {computation.name} is not a tuple but {instruction.opcode}")

    def _evaluate(
        self, instruction: Instruction, computation: Computation, state: dict[int, int], given: tuple[int, ...] = ()
    ) -> int:
        """An integer scalar; `state` holds elements of the loop's tuple, `given` the parameters of a fusion."""

        def operand(number: int) -> int:
            return self._evaluate(computation.instructions[instruction.operands[number]], computation, state, given)

        match instruction.opcode:
            case "constant":
                return {"true": 1, "false": 0}.get(instruction.arguments) or int(instruction.arguments)
            case "parameter" if given:
                return given[int(instruction.arguments)]
            case "get-tuple-element":
                index = int(instruction.attribute("index"))
                source = computation.instructions[instruction.operands[0]]
                if source.opcode == "parameter" and index in state:
                    return state[index]
                if source.opcode != "parameter":
                    return self._evaluate(self._element(computation, source.name, index), computation, state)
            case "copy" | "convert" | "bitcast" | "copy-done" | "copy-start":
                return operand(0)
            case "add":
                return operand(0) + operand(1)
            case "subtract":
                return operand(0) - operand(1)
            case "multiply":
                return operand(0) * operand(1)
            case "compare":
                left, right = operand(0), operand(1)
                return {
                    "LT": left < right, "LE": left <= right, "GT": left > right,
                    "GE": left >= right, "EQ": left == right, "NE": left != right,
                }[instruction.attribute("direction")]  # fmt: skip
            case "fusion":
                called = self.computations[instruction.called[0]]
                values = tuple(operand(number) for number in range(len(instruction.operands)))
                return self._evaluate(called.root, called, {}, values)
        raise ValueError(f"{instruction.name} of {computation.name}: cannot evaluate {instruction.opcode}")


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = name = None
    lines: list[str] = []
    for line in text.splitlines():
        if name is None:
            if found := _COMPUTATION.match(line):
                name, lines = found.group(2), []
                entry = name if found.group(1) else entry
        elif line == "}":
            computations[name] = _computation(name, lines)
            name = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # attributes of kernels hold line breaks
            lines[-1] += line
    if entry is None:
        raise ValueError("no HLO module: it has no ENTRY")
    return Program(computations, computations[entry])


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, None
    for line in lines:
        found = _INSTRUCTION.match(line)
        instruction = _instruction(found.group(2), line[found.end() :])
        instructions[instruction.name] = instruction
        root = instruction if found.group(1) or root is None else root
    return Computation(name, instructions, root)


def _instruction(name: str, rest: str) -> Instruction:
    type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", type_end)
    closing = _closing(rest, opening)
    return Instruction(
        name, rest[:type_end], rest[type_end:opening].strip(), rest[opening + 1 : closing], rest[closing + 1 :]
    )


def _closing(text: str, opening: int) -> int:
    """The index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"no closing parenthesis: {text[:80]!r}")


# --- Types ---------------------------------------------------------------------------------------------------------


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, shape) of every array in a type."""
    return [(d, tuple(int(n) for n in shape.split(",") if n)) for d, shape, _ in _ARRAY.findall(type_)]


def size_in_bytes(type_: str, main_memory_only: bool = False) -> int:
    """Bytes of all arrays in a type, without padding; main_memory_only: without those in the core's own memory."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_):
        if not (main_memory_only and re.search(r"S\([1-9]\)", layout)):
            total += math.ceil(_bits(dtype) * math.prod(int(n) for n in shape.split(",") if n) / 8)
    return total


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
