"""Facts out of the HLO text that a compiler gives back: what runs in a loop, how often, and how many bytes it moves.

`Module(text)` parses a compiled and scheduled module, `jax.stages.Compiled.as_text()`. Only what the facts need is kept
of it: instructions with their shapes, operands and the computations that they call.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from jaxlm.layers.exchange import LATER_ROUNDS

HBM = 0  # the memory space of a shape without a mark; a TPU's others are on the chip
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
# These only name or group buffers: no bytes move.
_ENTERED = ("async-start", "call", "call-start", "conditional")  # the instructions within move the bytes
_IDLE = ("after-all", "async-update", "bitcast", "constant", "get-tuple-element", "parameter", "tuple", "while", *_ENTERED)
Lengths = Mapping[str, int] | None
_SLICES = ("dynamic-slice", "gather", "slice", "slice-start")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: `space` is the memory that it lies in."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Its bytes without the layout's padding; 0 for tokens and the like."""
        bits = re.search(r"\d+", self.dtype)
        return self.size if self.dtype == "pred" else -(-self.size * int(bits[0] if bits else 0) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. Of a tuple, `shapes` has an entry per array, nested ones in order."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str  # attributes; for constants and parameters, first what stands in parentheses

    def attribute(self, name: str) -> str | None:
        """The value of `name=value` up to a comma, space or bracket, without the % of a reference."""
        found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run; `root` names the one whose value is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Number of a parameter -> its name."""
        return {int(re.match(r"\d+", one.rest)[0]): one.name for one in self.instructions.values()
                if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that read its value."""
        table: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                table[operand].append(one)
        return table

    def source(self, name: str) -> Instruction:
        """The instruction behind bitcasts."""
        one = self.instructions[name]
        return self.source(one.operands[0]) if one.opcode == "bitcast" else one


_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def _shapes(text: str) -> tuple[Shape, ...]:
    out = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        out.append(Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else HBM))
    return tuple(out)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"a parenthesis is not closed in the HLO line {text[:200]!r}")


def _instruction(name: str, text: str) -> Instruction:
    """From what stands after "name = "."""
    end = _closing(text, 0) if text.startswith("(") else _SHAPE.match(text).end()
    shapes, text = _shapes(text[:end]), text[end:].lstrip()
    start = text.index("(")
    opcode, end = text[:start], _closing(text, start)
    inside, rest = text[start + 1:end - 1], text[end:]
    if opcode in ("constant", "parameter"):
        return Instruction(name, opcode, shapes, (), inside + rest)
    return Instruction(name, opcode, shapes, tuple(re.findall(r"%([\w.\-]+)", inside)), rest)


class Module:
    """A compiled module: `computations` by name, and the `entry` among them.

    Raises:
      ValueError: for text without an entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        name, lines, root, entry = None, {}, "", None
        for line in text.splitlines():
            if name is None:
                if head := _HEAD.match(line):
                    name, lines, root = head[2], {}, ""
                    entry = name if head[1] else entry
            elif line.startswith("}"):
                self.computations[name] = Computation(name, lines, root)
                name = None
            elif found := _LINE.match(line):
                lines[found[2]] = _instruction(found[2], found[3])
                root = found[2] if found[1] else root
        if entry is None:
            raise ValueError("the text has no ENTRY computation: it is not the HLO of a compiled module")
        self.entry = self.computations[entry]
        self._loops = {one.attribute(part): (computation, one) for computation in self.computations.values()
                       for one in computation.instructions.values() if one.opcode == "while" for part in ("condition", "body")}

    def _literal(self, computation: Computation, name: str) -> int | None:
        """The integer that a value always is, where that can be seen: through copies, and what loops hand on unchanged."""
        one = computation.instructions[name]
        if one.opcode == "constant":
            found = re.match(r"-?\d+", one.rest)
            return int(found[0]) if found else None
        if one.opcode in ("bitcast", "copy"):
            return self._literal(computation, one.operands[0])
        if one.opcode != "get-tuple-element" or computation.name not in self._loops:
            return None
        if computation.instructions[one.operands[0]].opcode != "parameter":
            return None
        outside, loop = self._loops[computation.name]
        index, body = int(one.attribute("index")), self.computations[loop.attribute("body")]
        before, after = outside.instructions[loop.operands[0]], body.instructions[body.root]
        if before.opcode != "tuple" or after.opcode != "tuple":
            return None
        kept = body.instructions[after.operands[index]]
        unchanged = kept.opcode == "get-tuple-element" and int(kept.attribute("index")) == index
        return self._literal(outside, before.operands[index]) if unchanged else None

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a `while` runs that counts by equal steps from one constant to another; None for any other."""
        condition, body = self.computations[loop.attribute("condition")], self.computations[loop.attribute("body")]
        before, after = computation.instructions[loop.operands[0]], body.instructions[body.root]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or test.attribute("direction") != "LT" or {before.opcode, after.opcode} != {"tuple"}:
            return None
        counter = condition.instructions[test.operands[0]]
        if counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attribute("index"))
        step = body.instructions[after.operands[index]]
        by = [size for size in (self._literal(body, name) for name in step.operands) if size is not None]
        if step.opcode != "add" or len(by) != 1 or by[0] < 1:
            return None
        start, stop = self._literal(computation, before.operands[index]), self._literal(condition, test.operands[1])
        return None if start is None or stop is None else max(-((start - stop) // by[0]), 0)

    def loop(self) -> Computation:
        """The body of the one loop in the entry whose length is not known beforehand: that over generated tokens.

        Raises:
          ValueError: when there is none, or several.
        """
        found = self.unseen(self.entry)
        if len(found) != 1:
            raise ValueError(f"there should be one loop of unknown length in the entry computation, there are {len(found)}")
        return self.computations[found[0].attribute("body")]

    def unseen(self, computation: Computation) -> list[Instruction]:
        """The loops in a computation, but not within its loops, whose length cannot be seen."""
        loops = [one for one in computation.instructions.values() if one.opcode == "while"]
        return [one for one in loops if self.trips(computation, one) is None]

    def run(self, computation: Computation, lengths: Lengths = None,
            times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs as one, those in loops and branches within too, and how often. All branches count, but
        for the rounds in which a mixture of experts sends what an uneven load leaves over (`jaxlm.layers.exchange`).

        Args:
          lengths: how often the loops run whose length cannot be seen, by name.

        Raises:
          ValueError: for a loop within whose length can neither be seen nor is given; names it.
        """
        for one in computation.instructions.values():
            yield computation, one, times
            if one.opcode in ("while", "conditional") and LATER_ROUNDS in one.rest:
                continue
            if one.opcode == "while":
                trips = self.trips(computation, one)
                trips = (lengths or {}).get(one.name) if trips is None else trips
                if trips is None:
                    raise ValueError(f"how often the loop {one.name} in {computation.name} runs cannot be seen")
                for part in ("condition", "body") if trips else ():
                    yield from self.run(self.computations[one.attribute(part)], lengths, times * trips)
            elif one.opcode in _ENTERED:
                for names in re.findall(r"\b(?:calls|to_apply|\w+_computations?)=(\{[^}]*\}|\S+)", one.rest):
                    for name in re.findall(r"%([\w.\-]+)", names):
                        yield from self.run(self.computations[name], lengths, times)

    def fused(self, one: Instruction) -> Computation | None:
        """What a fusion computes; None for other instructions."""
        return self.computations[one.attribute("calls")] if one.opcode == "fusion" else None

    def writes(self, computation: Computation, one: Instruction) -> list[tuple[Shape, int]]:
        """Each array that an instruction gives and the bytes written for it: of one updated in place, only the update's."""
        if one.opcode in _IDLE or one.opcode.endswith("-done") or "AllocateBuffer" in one.rest or "ConcatBitcast" in one.rest:
            return []
        if one.opcode == "dynamic-update-slice":
            return [(one.shapes[0], computation.instructions[one.operands[1]].shapes[0].nbytes)]
        if one.opcode.endswith("-start"):  # (result, argument, ...) of a copy, ((arguments), result, ...) of others
            shape = one.shapes[0 if one.opcode == "copy-start" else min(len(one.operands), len(one.shapes) - 1)]
            return [(shape, shape.nbytes)]
        inner = self.fused(one)
        if inner is None:
            return [(shape, shape.nbytes) for shape in one.shapes]
        root = inner.instructions[inner.root]
        parts = root.operands if root.opcode == "tuple" else (root.name,)
        return [pair for part in parts for pair in self._given(inner, part)]

    def _given(self, inner: Computation, name: str) -> list[tuple[Shape, int]]:
        """`writes` of a value that a fused computation gives."""
        one = inner.source(name)
        deeper = self.fused(one)
        shape = inner.instructions[name].shapes[0]
        if deeper is not None and len(one.shapes) == 1:
            return [(shape, self._given(deeper, deeper.root)[0][1])]
        if one.opcode == "dynamic-update-slice" and inner.source(one.operands[0]).opcode == "parameter":
            return [(shape, inner.instructions[one.operands[1]].shapes[0].nbytes)]
        return [(shape, shape.nbytes)]

    def reads(self, computation: Computation, one: Instruction) -> list[tuple[Shape, int]]:
        """Each array that an instruction reads, and the bytes that it reads of it."""
        if one.opcode in _IDLE or one.opcode.endswith("-done"):
            return []
        inner, out = self.fused(one), []
        for place, operand in enumerate(one.operands):
            shapes = computation.instructions[operand].shapes
            if len(shapes) != 1:  # a tuple of buffers, for what stands behind it
                continue
            size = shapes[0].size
            if inner is not None:
                root = inner.instructions[inner.root]
                size = self._needed(inner, inner.parameters[place], root.shapes[0].size)
            elif place == 0 and one.opcode in _SLICES:
                size = min(shape.size for shape in one.shapes if shape.dtype == shapes[0].dtype)
            elif place == 0 and one.opcode == "dynamic-update-slice":
                size = 0
            out.append((shapes[0], size * shapes[0].nbytes // max(shapes[0].size, 1)))
        return out

    def _needed(self, inner: Computation, name: str, wanted: int) -> int:
        """How many numbers of a value a fused computation reads to give `wanted` of its result."""
        size = inner.instructions[name].shapes[0].size
        total = wanted if name == inner.root else 0
        for user in inner.users[name]:
            first = user.operands[0] == name
            if user.opcode in _SLICES and first:
                total += user.shapes[0].size
            elif user.opcode in ("bitcast", "convert", "copy", "reshape", "transpose"):
                total += self._needed(inner, user.name, wanted)
            elif user.opcode == "fusion":
                deeper, through = self.fused(user), self._needed(inner, user.name, wanted)
                total += sum(self._needed(deeper, deeper.parameters[place], through)
                             for place, operand in enumerate(user.operands) if operand == name)
            elif user.opcode != "dynamic-update-slice" or not first:
                total += size
        return min(total, size)


def traffic(module: Module, computation: Computation, lengths: Lengths = None) -> int:
    """Bytes to and from HBM in one run of a computation: what its instructions read and write of the arrays that lie there, and
    what kernels say of themselves."""
    total = 0
    for where, one, times in module.run(computation, lengths):
        said = _estimate(one, "bytes_accessed")
        total += times * (said if said is not None else sum(
            size for shape, size in (*module.reads(where, one), *module.writes(where, one)) if shape.space == HBM))
    return total


def _estimate(one: Instruction, name: str) -> int | None:
    """A number of a kernel's own estimate of its cost; None for what is no kernel or says nothing."""
    found = re.search(rf'"cost_estimate":{{[^}}]*"{name}":"(\d+)"', one.rest) if one.opcode == "custom-call" else None
    return None if found is None else int(found[1])


def copies(module: Module, computation: Computation, sizes: set[int], lengths: Lengths = None) -> Counter[int]:
    """How often arrays of as many numbers as one of `sizes` are written anew in one run, by the memory that they lie in.

    What is updated in place does not count. Copies in another type or order do: only the size is compared.
    """
    found: Counter[int] = Counter()
    for where, one, times in module.run(computation, lengths):
        for shape, written in module.writes(where, one):
            if shape.size in sizes and written == shape.nbytes:
                found[shape.space] += times
    return found


def collectives(module: Module, computation: Computation, lengths: Lengths = None) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} in one run of a computation; bytes are those of the results on one chip.

    One that is spread over several fusions, to go on beside what they compute, stands in each with its channel; different
    ones may share a channel too. An all-reduce of which each chip keeps a part is fused with the cut, and is a reduce-scatter.
    """
    found: dict[str, Counter[str]] = {kind: Counter() for kind in COLLECTIVES}
    spread: set[tuple[object, ...]] = set()
    for _, instruction, times in module.run(computation, lengths):
        inner = module.fused(instruction)
        for one in (instruction,) if inner is None else inner.instructions.values():
            kind, channel = one.opcode.removesuffix("-start"), one.attribute("channel_id")
            same = (channel, kind, *((shape.dtype, shape.dims) for shape in one.shapes))
            if kind in found and same not in spread:
                if channel is not None and inner is not None:
                    spread.add(same)
                shapes = one.shapes
                if inner is not None and kind == "all-reduce" and inner.name.startswith("all-reduce-scatter"):
                    kind, shapes = "reduce-scatter", instruction.shapes
                sizes = [shape.nbytes for shape in shapes]
                found[kind].update(count=times, bytes=times * (max(sizes) if one.opcode.endswith("-start") else sum(sizes)))
    return {kind: dict(counts) for kind, counts in found.items() if counts}


def flops(module: Module, computation: Computation, lengths: Lengths = None) -> int:
    """FLOPs of the matrix products in one run of a computation, on one chip; of kernels what they say of themselves."""
    total = 0
    for where, one, times in module.run(computation, lengths):
        total += times * _product_flops(module, where, one)
    return total


def _product_flops(module: Module, where: Computation, one: Instruction) -> int:
    """Of one instruction, with those fused into it."""
    inner = module.fused(one)
    if inner is not None:
        return sum(_product_flops(module, inner, part) for part in inner.instructions.values())
    if one.opcode == "dot":
        left = where.instructions[one.operands[0]].shapes[0].dims
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        return 2 * one.shapes[0].size * math.prod(left[int(dim)] for dim in summed[1].split(",") if dim)
    if one.opcode != "convolution":
        return _estimate(one, "flops") or 0
    # A TPU's products are convolutions. Their dimensions of space are those of a batch, where each place meets one of the
    # kernel's, unless the result has none of them left: those are summed over, as the features are.
    right, out = where.instructions[one.operands[1]].shapes[0].dims, one.shapes[0].dims
    _, kernel, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest).groups()
    summed = 1
    for label, size in zip(kernel, right, strict=True):
        if label == "i" or (label.isdigit() and out[result.index(label)] == 1):
            summed *= size
    return 2 * math.prod(out) * summed


def host_transfers(text: str) -> int:
    """How many operations of a program talk to the host: callbacks, infeeds, outfeeds. Takes StableHLO or HLO text."""
    return sum(bool(re.search(r"is_host_transfer ?= ?true|\b(?:stablehlo\.)?(?:in|out)feed\b|custom[-_]call.*callback", line))
               for line in text.splitlines() if "send-done" not in line and "recv-done" not in line)
