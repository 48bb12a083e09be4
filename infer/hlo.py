"""Facts out of the HLO text that a compiler gives back: what runs in a loop, how often, and how many bytes it moves.

`Module(text)` parses the text of a compiled, scheduled module (`jax.stages.Compiled.as_text()`). Only what the facts need is
kept of it: instructions with their shapes, operands and the computations that they call.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

HBM = 0  # the memory space that a shape without a mark lies in; TPUs' others are on the chip
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
# Opcodes that only name or group buffers that others wrote.
NAMES = ("after-all", "bitcast", "constant", "get-tuple-element", "parameter", "tuple")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: `space` is the memory that it lies in, 0 for HBM."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes without the layout's padding; 0 for tokens and the like."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0
        return -(-self.size * width // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shapes` has an entry per array of a tuple, nested ones in order."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str  # what stands between the parentheses and after: literals, attributes

    def attribute(self, name: str) -> str | None:
        """The value of `name=value` up to the next comma or space, without the % of a reference."""
        found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run; `root` is the one whose value is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Parameter number -> instruction name."""
        return {int(re.match(r"\d+", i.rest)[0]): i.name for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instruction name -> those that read it."""
        table: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                table[operand].append(instruction)
        return table


_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def _shapes(text: str) -> tuple[Shape, ...]:
    out = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        out.append(Shape(dtype, tuple(int(d) for d in dims.split(",") if d), int(space[1]) if space else HBM))
    return tuple(out)


def _balanced(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "({") - (text[place] in ")}")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced brackets in HLO: {text[:200]}")


def _instruction(name: str, text: str) -> Instruction:
    """From what stands after "name = "."""
    if text.startswith("("):
        end = _balanced(text, 0)
    else:
        end = _SHAPE.match(text).end()
    shapes, text = _shapes(text[:end]), text[end:].lstrip()
    opcode, start = text[:text.index("(")], text.index("(")
    end = _balanced(text, start)
    inside = text[start + 1:end - 1]
    if opcode in ("constant", "parameter"):  # a literal or a number, no operands
        return Instruction(name, opcode, shapes, (), inside + text[end:])
    return Instruction(name, opcode, shapes, tuple(re.findall(r"%([\w.\-]+)", inside)), text[end:])


class Module:
    """A compiled module: `computations` by name, and the `entry` among them."""

    def __init__(self, text: str):
        """Raises:
          ValueError: when the text has no entry computation.
        """
        self.computations: dict[str, Computation] = {}
        entry, name, lines, root = None, None, {}, ""
        for line in text.splitlines():
            if name is None:
                head = _HEAD.match(line)
                if head:
                    name, lines, root = head[2], {}, ""
                    entry = name if head[1] else entry
            elif line.startswith("}"):
                self.computations[name] = Computation(name, lines, root)
                name = None
            elif found := _LINE.match(line):
                lines[found[2]] = _instruction(found[2], found[3])
                root = found[2] if found[1] else root
        if entry is None:
            raise ValueError("the text holds no ENTRY computation: it is not the HLO of a compiled module")
        self.entry = self.computations[entry]

    def shapes(self, computation: Computation, name: str) -> tuple[Shape, ...]:
        """What an instruction gives."""
        return computation.instructions[name].shapes

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a counted `while` runs: from a constant to a constant by ones. None where that is not how it ends."""
        condition = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, bound = (condition.instructions[name] for name in test.operands)
        if counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attribute("index"))
        entered = computation.instructions[loop.operands[0]]
        left = body.instructions[body.root]
        if entered.opcode != "tuple" or left.opcode != "tuple":
            return None
        step = body.instructions[left.operands[index]]
        if step.opcode != "add" or 1 not in (_literal(body, name) for name in step.operands):
            return None
        start = _literal(computation, entered.operands[index])
        if bound.opcode == "get-tuple-element":
            stop = _literal(computation, entered.operands[int(bound.attribute("index"))])
        else:
            stop = _literal(condition, bound.name)
        return None if start is None or stop is None else max(stop - start, 0)

    def loop(self) -> Computation:
        """The body of the one loop whose end is not known beforehand: that over generated tokens.

        Raises:
          ValueError: when the entry holds no such loop, or several.
        """
        found = [i for i in self.entry.instructions.values() if i.opcode == "while" and self.trips(self.entry, i) is None]
        if len(found) != 1:
            raise ValueError(f"expected one loop of unknown length in the entry computation, found {len(found)}")
        return self.computations[found[0].attribute("body")]

    def run(self, computation: Computation, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs as one, what loops and branches hold included, and how often it does.

        A loop within whose length is not known counts once, and of branches all count.
        """
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                inner = times * (self.trips(computation, instruction) or 1)
                for part in ("condition", "body"):
                    yield from self.run(self.computations[instruction.attribute(part)], inner)
            elif instruction.opcode in ("conditional", "call"):
                for name in re.findall(r"(?:to_apply|\w+_computations?)=\{?([^}\s]+)", instruction.rest):
                    for branch in re.findall(r"[^%,]+", name):
                        yield from self.run(self.computations[branch], times)

    def fused(self, instruction: Instruction) -> Computation | None:
        """What a fusion computes."""
        return self.computations[instruction.attribute("calls")] if instruction.opcode == "fusion" else None

    def _source(self, computation: Computation, name: str) -> Instruction:
        """The instruction behind bitcasts."""
        instruction = computation.instructions[name]
        return self._source(computation, instruction.operands[0]) if instruction.opcode == "bitcast" else instruction

    def _written(self, computation: Computation, name: str, inside: bool) -> list[tuple[Shape, int]]:
        """(shape, bytes written) of each array that an instruction gives: only the update of one updated in place."""
        instruction = self._source(computation, name) if inside else computation.instructions[name]
        inner = self.fused(instruction)
        if inner is not None:
            root = inner.instructions[inner.root]
            parts = root.operands if root.opcode == "tuple" else (root.name,)
            sizes = [size for part in parts for _, size in self._written(inner, part, True)]
            return [(shape, size) for shape, size in zip(instruction.shapes, sizes, strict=True)]
        if instruction.opcode == "dynamic-update-slice":
            old = self._source(computation, instruction.operands[0])
            if not inside or old.opcode == "parameter":
                return [(instruction.shapes[0], computation.instructions[instruction.operands[1]].shapes[0].nbytes)]
        if instruction.opcode == "copy-start":
            return [(instruction.shapes[0], instruction.shapes[0].nbytes)]
        if instruction.opcode.endswith("-start"):
            shape = instruction.shapes[min(len(instruction.operands), len(instruction.shapes) - 1)]
            return [(shape, shape.nbytes)]
        return [(shape, shape.nbytes) for shape in instruction.shapes]

    def writes(self, computation: Computation, instruction: Instruction) -> list[tuple[Shape, int]]:
        """(shape, bytes written) of each array that an instruction which runs as one writes anew or updates in place."""
        if instruction.opcode in (*NAMES, "while", "conditional", "call") or instruction.opcode.endswith("-done"):
            return []
        if instruction.opcode == "custom-call" and _target(instruction) in ("AllocateBuffer", "ConcatBitcast"):
            return []
        return self._written(computation, instruction.name, False)

    def _needed(self, computation: Computation, name: str, at_root: int) -> int:
        """How many numbers of a value a fused computation reads when `at_root` of its result are wanted."""
        size = computation.instructions[name].shapes[0].size
        total = at_root if name == computation.root else 0
        for user in computation.users[name]:
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.shapes[0].size
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass
            elif user.opcode in ("bitcast", "copy", "convert", "reshape", "transpose"):
                total += self._needed(computation, user.name, at_root)
            elif user.opcode == "fusion":
                inner = self.fused(user)
                wanted = self._needed(computation, user.name, at_root)
                total += sum(self._needed(inner, inner.parameters[place], wanted)
                             for place, operand in enumerate(user.operands) if operand == name)
            else:
                total += size
        return min(total, size)

    def reads(self, computation: Computation, instruction: Instruction) -> list[tuple[Shape, int]]:
        """(shape, bytes read) of each array that an instruction which runs as one reads."""
        if instruction.opcode in (*NAMES, "while", "conditional", "call") or instruction.opcode.endswith("-done"):
            return []
        inner, out = self.fused(instruction), []
        for place, operand in enumerate(instruction.operands):
            shapes = computation.instructions[operand].shapes
            if len(shapes) != 1:
                continue
            whole = shapes[0].size
            if inner is not None:
                root = inner.instructions[inner.root].shapes[0].size
                whole = self._needed(inner, inner.parameters[place], root)
            elif place == 0 and instruction.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
                whole = min(whole, min(shape.size for shape in instruction.shapes if shape.dtype == shapes[0].dtype))
            elif place == 0 and instruction.opcode == "dynamic-update-slice":
                whole = 0
            out.append((shapes[0], whole * shapes[0].nbytes // max(shapes[0].size, 1)))
        return out


def _literal(computation: Computation, name: str) -> int | None:
    """An integer constant, behind copies and bitcasts too."""
    instruction = computation.instructions[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _literal(computation, instruction.operands[0])
    found = re.match(r"-?\d+(?=\))|-?\d+$", instruction.rest) if instruction.opcode == "constant" else None
    return int(found[0]) if found else None


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def traffic(module: Module, computation: Computation) -> int:
    """Bytes to and from HBM in one run of a computation: what each instruction reads and writes of arrays that lie there."""
    return sum(times * sum(size for shape, size in [*module.reads(where, i), *module.writes(where, i)] if shape.space == HBM)
               for where, i, times in module.run(computation))


def copies(module: Module, computation: Computation, sizes: set[int], space: int | None = HBM) -> list[Instruction]:
    """Instructions that write anew an array of as many numbers as one of `sizes`, once for each time they run.

    Arrays updated in place do not count, whatever their size.

    Args:
      space: only arrays that lie in this memory; None: in any.
    """
    found = []
    for where, instruction, times in module.run(computation):
        hits = sum(shape.size in sizes and written == shape.nbytes and space in (None, shape.space)
                   for shape, written in module.writes(where, instruction))
        found += [instruction] * (times * hits)
    return found


def collectives(module: Module, computation: Computation) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} in one run of a computation; bytes are those of the results on one chip."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for _, instruction, times in module.run(computation):
        inner = module.fused(instruction)
        for one in [instruction] if inner is None else inner.instructions.values():
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                counts[kind] += times
                every = [shape.nbytes for shape in one.shapes]
                sizes[kind] += times * (max(every) if one.opcode.endswith("-start") else sum(every))
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)}


def host_transfers(module: Module) -> int:
    """How many instructions anywhere in a module talk to the host: callbacks, infeeds and outfeeds."""
    every = itertools.chain.from_iterable(c.instructions.values() for c in module.computations.values())
    return sum(i.opcode in ("infeed", "outfeed")
               or (i.opcode in ("send", "recv") and "is_host_transfer=true" in i.rest)
               or (i.opcode == "custom-call" and "callback" in _target(i).lower()) for i in every)
