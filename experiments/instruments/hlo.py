"""What a compiled program will do, read from its text: collectives and memory traffic.

Compilers count the body of a loop once; here everything is multiplied by how often it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"^((?:\([^=]*?\)|\S+)) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_ON_CHIP = re.compile(r"\b[a-z]+\d*\w*\[[\d,]*\]\{[^}]*S\([1-9]\)[^}]*\}")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
_FREE_TOO = ("after-all", "partition-id", "iota", "call")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: text of the result's shape, a tuple's in parentheses.
      operation: "fusion".
      rest: operands and attributes, as they stand.
      root: whether it is the computation's result.
    """

    name: str
    shape: str
    operation: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        depth, inside = 1, ""
        for letter in self.rest:
            depth += (letter == "(") - (letter == ")")
            if not depth:
                break
            inside += letter
        return re.findall(r"%([\w.\-]+)", inside)


@dataclasses.dataclass
class Program:
    """A compiled module.

    Attributes:
      computations: instructions by the computation's name.
      entry: name of the one that runs.
      usual: iterations, on average, of loops that may end before the bound that they have, by that
        bound; without it they run up to it.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    usual: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def runs(self) -> dict[str, float]:
        """How often each computation runs; fusions and reducers are not followed."""
        counts: dict[str, float] = {}
        waiting: list[tuple[str, float]] = [(self.entry, 1)]
        while waiting:
            name, times = waiting.pop()
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name]:
                waiting += [(c, n * times) for c, n in self._callees(instruction)]
        return counts

    def _callees(self, instruction: Instruction) -> Iterator[tuple[str, float]]:
        rest = instruction.rest
        if instruction.operation == "while":
            body = re.search(r"body=%?([\w.\-]+)", rest)
            assert body is not None
            yield body[1], self._trips(instruction)
        elif instruction.operation == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
            names = branches[1].split(",") if branches else _CALLED.findall(rest)
            for name in names:
                yield name.strip().lstrip("%"), 1
        elif instruction.operation in ("call", "async-start"):
            for name in _CALLED.findall(rest):
                yield name, 1

    def _trips(self, loop: Instruction) -> float:
        """Iterations: known to the compiler, or the bound that the condition compares with."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        assert condition is not None
        bounds = [
            int(re.match(r"(\d+)\)", i.rest)[1])  # type: ignore[index]
            for i in self.computations[condition[1]]
            if i.operation == "constant" and re.match(r"(\d+)\)", i.rest)
        ]
        bound = max(bounds, default=1)
        return self.usual.get(bound, bound)


def parse(text: str, usual: Mapping[int, float] | None = None) -> Program:
    """Reads `compiled.as_text()`; `usual` as of `Program`.

    Raises:
      ValueError: no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            if header and "->" in line:
                current = header[2]
                computations[current] = []
                entry = current if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        parsed = _OPERATION.match(re.sub(r"/\*.*?\*/", "", found[3])) if found else None
        if found and parsed and current:
            computations[current].append(
                Instruction(found[2], parsed[1], parsed[2], parsed[3], bool(found[1]))
            )
    if not entry:
        raise ValueError("parse: expected the text of a compiled HLO module, found no entry in it.")
    return Program(computations, entry, usual or {})


def shape_bytes(shape: str) -> int:
    """Bytes of a shape, or of all parts of a tuple.

    >>> shape_bytes("(bf16[2,3]{1,0}, f32[])")
    16
    """
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        width = WIDTHS.get(dtype)
        if width is None:
            width = max(int(re.search(r"\d+", dtype)[0]) // 8, 1)  # type: ignore[index]
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total


def memory_bytes(shape: str) -> int:
    """Bytes of a shape in the device's main memory; on-chip parts, S(1) in a TPU's, do not count.

    >>> memory_bytes("(bf16[2,3]{1,0:T(8,128)S(1)}, f32[])")
    4
    """
    return shape_bytes(_ON_CHIP.sub("", shape))


# ---------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Of one kind of collective, on one device.

    Attributes:
      times: how often one runs, on average where a loop may end early.
      bytes: of their results (a reduce-scatter's: of its operand).
      wire: bytes that leave the device, by ring algorithms.
      largest: bytes of the largest.
    """

    times: float
    bytes: float
    wire: float
    largest: int


def collectives(program: Program) -> dict[str, Traffic]:
    """Traffic by kind of collective; loops are counted as often as they run."""
    found: dict[str, Traffic] = {}
    for name, times in program.runs().items():
        for kind, size, group in _collectives_of(program, name):
            before = found.get(kind, Traffic(0, 0, 0.0, 0))
            found[kind] = Traffic(
                before.times + times,
                before.bytes + times * size,
                before.wire + times * size * _wire_share(kind, group),
                max(before.largest, size),
            )
    return found


def _collectives_of(program: Program, name: str) -> Iterator[tuple[str, int, int]]:
    """Kind, bytes and number of devices of a computation's collectives, those in fusions included.

    A fusion may hold one beside other work, or a slice of its result; and one that is spread over
    several fusions is one, since all name the same channel.
    """
    spread = set()
    for instruction in program.computations[name]:
        called = _CALLED.search(instruction.rest) if instruction.operation == "fusion" else None
        where = called[1] if called else name
        for inner in program.computations[where] if called else [instruction]:
            kind = inner.operation.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", inner.rest)
            if called and channel:
                if channel[1] in spread:
                    continue
                spread.add(channel[1])
            shapes = {i.name: i.shape for i in program.computations[where]}
            size = _collective_bytes(kind, inner, shapes)
            if where.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            yield kind, size, _group_size(inner.rest)


def _collective_bytes(kind: str, instruction: Instruction, shapes: dict[str, str]) -> int:
    operands = sum(shape_bytes(shapes.get(name, "")) for name in instruction.operands)
    if kind == "reduce-scatter":
        return operands
    size = shape_bytes(instruction.shape)
    # The result of a start holds its operand as well.
    starts = instruction.operation.endswith("-start") and instruction.shape.startswith("(")
    return size - operands if starts and kind in ("all-gather", "collective-permute") else size


def _group_size(rest: str) -> int:
    """Devices that take part in one collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if regular := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(regular[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2  # a permutation's pairs


def _wire_share(kind: str, group: int) -> float:
    """Bytes that leave a device, per byte of the collective."""
    if kind == "collective-permute":
        return 1.0
    share = (group - 1) / max(group, 1)
    return 2 * share if kind == "all-reduce" else share


# ---------------------------------------------------------------------------------------------
# Memory traffic
# ---------------------------------------------------------------------------------------------


def memory_traffic(program: Program) -> float:
    """Bytes read from and written to a device's memory.

    Each instruction reads its operands and writes its result, a fusion what crosses its border; of
    an array that is only sliced or updated in place, the slice counts. What stays on the chip does
    not count, and an asynchronous instruction does where it starts.
    """
    total = 0.0
    for name, times in program.runs().items():
        instructions = program.computations[name]
        shapes = {i.name: i.shape for i in instructions}
        total += times * sum(
            _touched(program, instruction, shapes)
            for instruction in instructions
            if instruction.operation not in _FREE + _FREE_TOO
            and not instruction.operation.endswith(("-done", "-update"))
        )
    return total


def _touched(program: Program, instruction: Instruction, shapes: dict[str, str]) -> int:
    sizes = [memory_bytes(shapes.get(name, "")) for name in instruction.operands]
    result = memory_bytes(instruction.shape)
    if instruction.operation in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if instruction.operation == "dynamic-update-slice":
        return 2 * (sizes[1] if len(sizes) > 1 else 0)
    if instruction.operation == "fusion":
        called = _CALLED.search(instruction.rest)
        if called:
            return _fusion_bytes(program, program.computations[called[1]], sizes, result)
    if instruction.operation.endswith("-start") and instruction.shape.startswith("("):
        return max(result, sum(sizes))  # whose result holds its operand as well
    return sum(sizes) + result


def _fusion_bytes(
    program: Program, inside: list[Instruction], sizes: list[int], result: int
) -> int:
    shapes = {i.name: i.shape for i in inside}
    total = result
    for instruction in inside:
        if result and instruction.root and instruction.operation == "dynamic-update-slice":
            total = shape_bytes(shapes.get(instruction.operands[1], ""))
    for name, number in _parameters(inside):
        whole = sizes[number] if number < len(sizes) else 0
        part = _part(program, inside, name)
        total += whole if part is None else min(whole, part)
    return total


def _parameters(inside: list[Instruction]) -> Iterator[tuple[str, int]]:
    """Names and numbers of a computation's parameters."""
    for instruction in inside:
        number = re.match(r"(\d+)\)", instruction.rest)
        if instruction.operation == "parameter" and number is not None:
            yield instruction.name, int(number[1])


def _part(program: Program, inside: list[Instruction], name: str) -> int | None:
    """Bytes that a computation takes of one of its arrays, if only parts; None for all of it."""
    shapes = {i.name: i.shape for i in inside}
    uses = [i for i in inside if name in i.operands]
    total = 0
    for use in uses:
        part: int | None = None
        called = _CALLED.search(use.rest)
        if use.operation in ("dynamic-slice", "gather") and use.operands[0] == name:
            part = shape_bytes(use.shape)
        elif use.operation == "dynamic-update-slice" and use.operands[0] == name:
            part = shape_bytes(shapes.get(use.operands[1], ""))
        elif use.operation == "bitcast":
            part = _part(program, inside, use.name)
        elif use.operation == "fusion" and called:
            inner = program.computations[called[1]]
            names = {number: parameter for parameter, number in _parameters(inner)}
            number = use.operands.index(name)
            part = _part(program, inner, names[number]) if number in names else None
        if part is None:
            return None
        total += part
    return total if uses else None
