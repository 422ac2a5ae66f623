"""What devices exchange in a compiled program, read from XLA's own text of it.

Bytes are those that one device has to send at least, in a group of n, whatever the algorithm: an all-gather that makes
R bytes R·(n−1)/n, a reduce-scatter of R bytes and an all-to-all the same, an all-reduce twice that, a permutation what
it passes on. What is in a loop counts as often as the loop runs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from agentark_jax.errors import AgentArkError

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COPIES = ("copy", "bitcast", "convert")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shape` is XLA's word for the result, `rest` what follows the operands."""

    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, name: str) -> str:
        """What is written after `name=`. Raises AgentArkError where nothing is."""
        found = re.search(rf"\b{name}=%?([^\s,]+)", self.rest)
        if found is None:
            raise AgentArkError(f"{self.opcode} without {name}: this version of XLA writes another text")
        return found[1]


@dataclass(frozen=True)
class Collective:
    """One exchange: `bytes` of one device each time, `times` in a run of the program, in groups of `group` devices.

    `shape` is what comes of it, `channel` which exchange of the program it is, `where` the JAX operation behind it,
    `fused` that it is one of several copies. `ring`: what a permutation is a part of, "all-gather" or "reduce-scatter",
    when the TPU compiler passes parts around and multiplies meanwhile.
    """

    kind: str
    shape: str
    group: int
    bytes: float
    channel: str
    where: str
    fused: bool = False
    ring: str = ""
    times: int = 1

    @property
    def total(self) -> float:
        """Bytes in a run of the program."""
        return self.bytes * self.times


Computation = Mapping[str, Instruction]  # by name and in order: the last one gives the result


@dataclass(frozen=True)
class Frame:
    """A computation as it is run; `outer` and `loop` say where its parameter comes from when it is a part of a loop."""

    computation: Computation
    outer: "Frame | None" = None
    loop: Instruction | None = None

    def inside(self, computation: Computation, loop: Instruction) -> "Frame":
        """The body or the condition of a loop of this computation."""
        return Frame(computation, self, loop)

    @property
    def result(self) -> Instruction:
        return list(self.computation.values())[-1]

    def source(self, name: str) -> Instruction:
        """The instruction that makes a value, behind all copies of it."""
        instruction = self.computation[name]
        return self.source(instruction.operands[0]) if instruction.opcode in _COPIES else instruction

    def element(self, name: str) -> int | None:
        """Which element of the loop's state a value is; None for one that is made here."""
        instruction = self.source(name)
        made_here = instruction.opcode != "get-tuple-element"
        if made_here or self.computation[instruction.operands[0]].opcode != "parameter":
            return None
        return int(instruction.attribute("index"))

    def is_constant(self, name: str) -> bool:
        """Whether `constant` has a value."""
        try:
            self.constant(name)
        except ValueError:
            return False
        return True

    def constant(self, name: str) -> int:
        """The value of a constant, also of one that is handed into the loop. Raises ValueError for another value."""
        instruction, index = self.source(name), self.element(name)
        if instruction.opcode == "constant":
            return int(instruction.operands[0])
        if index is None or self.outer is None or self.loop is None:
            raise ValueError(f"{name} is no constant but {instruction.opcode}")
        start = self.outer.source(self.loop.operands[0])
        return self.outer.constant(start.operands[index])


class Program:
    """A compiled program from its text (`jax.stages.Compiled.as_text`).

    `dynamic`: how often a loop runs whose bound the devices compute; without it, a collective in one is an error.
    """

    def __init__(self, text: str, dynamic: int | None = None) -> None:
        self.dynamic = dynamic
        found = re.search(r"\bnum_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif name := _NAME.match(line):
                current[name[1]] = _instruction(line[name.end() :])
        if not self.entry:
            raise AgentArkError("a compiled program without an entry: this version of XLA writes another text")

    @cached_property
    def collectives(self) -> list[Collective]:
        """All exchanges of one run. Raises AgentArkError where it cannot be told how often there is one.

        The TPU compiler spreads a collective that runs beside other work over several fusions, and each has a copy of
        it, some of them in a loop that runs meanwhile: of such copies, the one that runs least counts.
        """
        whole: list[Collective] = []
        copies: dict[Collective, Collective] = {}
        for one in self._within(Frame(self.computations[self.entry])):
            if one.fused:
                same = replace(one, times=1)
                copies[same] = min(one, copies.get(same, one), key=lambda copy: copy.times)
            else:
                whole.append(one)
        rings = {(one.shape, one.where): one.ring for one in whole if one.ring}
        # The first or the last pass of a ring stands beside its loop.
        whole = [replace(one, ring=one.ring or rings.get((one.shape, one.where), "")) for one in whole]
        return [*whole, *copies.values()]

    def _within(self, frame: "Frame") -> Iterator[Collective]:
        """What one computation exchanges when it runs once, copies included."""
        for name, instruction in frame.computation.items():
            opcode = instruction.opcode
            if opcode == "while":
                inside = frame.inside(self.computations[instruction.attribute("body")], instruction)
                inner = list(self._within(inside))
                trips = self._trips(name, instruction, frame, inside) if inner else 0
                ring = _ring(instruction.attribute("body"))
                for one in inner:
                    of_ring = ring if one.kind == "collective-permute" else ""
                    yield replace(one, times=one.times * trips, ring=one.ring or of_ring)
            elif opcode == "fusion":
                called = Frame(self.computations[instruction.attribute("calls")])
                yield from (replace(one, fused=True) for one in self._within(called))
            elif opcode in ("call", "async-start"):
                called = instruction.attribute("to_apply" if opcode == "call" else "calls")
                yield from self._within(Frame(self.computations[called]))
            elif opcode == "conditional":
                branches = re.findall(r"%([\w.\-]+)", instruction.rest.split("metadata=")[0])
                found = [self._within(Frame(self.computations[name])) for name in branches if name in self.computations]
                if any(map(list, found)):
                    raise AgentArkError(
                        f"{name}: there are collectives that only some runs reach; nobody can count them"
                    )
            elif (kind := opcode.removesuffix("-start")) in KINDS:
                yield self._collective(kind, instruction)

    def _trips(self, name: str, loop: Instruction, frame: "Frame", body: "Frame") -> int:
        """How often a loop runs: as the text says, or from a counter that goes up to a constant.

        Such loops are those of `jax.lax.scan` and of the compilers; that of CPUs says how often they run. Raises
        AgentArkError for another loop.
        """
        if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(said[1])
        condition = frame.inside(self.computations[loop.attribute("condition")], loop)
        compare = condition.result
        try:
            if compare.opcode != "compare" or compare.attribute("direction") != "LT":
                raise ValueError(f"its condition ends with {compare.opcode}")
            counter, bound = compare.operands
            index = condition.element(counter)
            next_counter = body.source(body.result.operands[index])
            steps = [body.constant(operand) for operand in next_counter.operands if body.element(operand) != index]
            if next_counter.opcode != "add" or len(steps) != 1:
                raise ValueError(f"its counter is made by {next_counter.opcode}")
            if self.dynamic is not None and not condition.is_constant(bound):
                return self.dynamic
            last, first = condition.constant(bound), condition.constant(counter)
        except (KeyError, IndexError, ValueError) as error:
            raise AgentArkError(f"{name}: how often this loop runs cannot be told ({error})") from error
        return max(0, math.ceil((last - first) / steps[0]))

    def _collective(self, kind: str, instruction: Instruction) -> Collective:
        shape = instruction.shape
        if instruction.opcode.endswith("-start") and kind != "all-reduce" and shape.startswith("("):
            shape = _elements(shape)[1]  # of (operands, results, …)
        made = array_bytes(shape)
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        where = re.search(r'op_name="([^"]*)"', instruction.rest)
        if kind == "collective-permute":
            given = re.search(r"source_target_pairs=\{(.*?\})\}", instruction.rest)
            pairs = re.findall(r"\{(\d+),(\d+)\}", given[1] if given else "")
            sending = sum(source != target for source, target in pairs)
            group, sent = self.devices, made * sending / self.devices
        else:
            group = group_size(instruction.rest, self.devices)
            whole = made * group if kind == "reduce-scatter" else made
            sent = whole * (group - 1) / group * (2 if kind == "all-reduce" else 1)
        plain = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
        return Collective(kind, plain, group, sent, channel[1] if channel else "", where[1] if where else "")


def _ring(body: str) -> str:
    """What the TPU compiler's loop of this name does piece by piece."""
    found = re.search(r"windowed_dot_general_body_(ag|rs)", body)
    return "" if found is None else {"ag": "all-gather", "rs": "reduce-scatter"}[found[1]]


def array_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, by XLA's word for it."""
    total = 0
    for word, bits, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        width = 8 if word == "pred" else int(bits)
        total += math.prod(int(size) for size in sizes.split(",") if size) * width // 8
    return total


def group_size(attributes: str, devices: int) -> int:
    """How many devices exchange with each other, from any of the three forms of `replica_groups`."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # A part of an axis is written 'axis':(parts before it)size.
        return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if "replica_groups={}" in attributes:
        return devices
    raise AgentArkError(f"a collective without groups that are known: {attributes[:200]}")


def _elements(shape: str) -> list[str]:
    """The words for the elements of a tuple."""
    depth, start, found = 0, 1, []
    for place, letter in enumerate(shape):
        if (letter == "," and depth == 1) or place == len(shape) - 1:
            found.append(shape[start:place].strip())
            start = place + 1
        depth += (letter in "([{") - (letter in ")]}")
    return found


def _instruction(text: str) -> Instruction:
    """From what is written after `name = `."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, call = text[:end], text[end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    inside = re.sub(r"/\*.*?\*/", "", call[opening + 1 : closing - 1])
    operands = tuple(word.strip().split(" ")[-1].lstrip("%") for word in inside.split(",")) if inside else ()
    return Instruction(shape, call[:opening], operands, call[closing:])


def _closing(text: str, opening: int) -> int:
    """The place after the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise AgentArkError("a parenthesis stays open: this version of XLA writes another text")
