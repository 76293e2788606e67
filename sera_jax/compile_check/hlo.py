"""What a compiled program moves: bytes to and from HBM, and between chips, read off its HLO text.

A loop body counts as often as the loop turns: the number stands in the loop's condition where it is known, and is given
by the caller where it is not. What crosses chips is counted as bytes that one chip takes in (of n chips of a group, an
all-gather of parts of b bytes brings it (n - 1)·b); a collective that the compiler spreads over several fusions to hide
it has one channel and counts once. libtpu writes some of them as permutes or as sends between slices: they count as
what they are.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_COLLECTIVES: dict[str, Callable[[float, int], float]] = {
    "all-gather": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
    "collective-broadcast": lambda size, n: size,
}
"""Name → (bytes of the operands on a chip, chips of a group) → bytes that a chip takes in."""

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier", "domain", "send", "send-done", "recv", "recv-done", "copy-done", "async-update",
    "async-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. shape: as written; operands: names, of a constant its value, of a parameter its number; rest:
    what stands behind them."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions, the last of which is its result unless another is marked."""

    instructions: dict[str, Instruction]
    root: Instruction


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes of one chip: to and from HBM; taken in from chips of its slice, by the name of the collective; sent to
    other slices."""

    hbm: float
    links: dict[str, float]
    network: float

    @property
    def taken_in(self) -> float:
        return sum(self.links.values())


def moved(text: str, trips: int = 1) -> Moved:
    """Reads a program (`executable.as_text()`).

    Args:
        trips: of loops whose length is not in the text.
    """
    computations, entry = parse(text)
    total: dict[str, float] = {}
    for kind, size in _walk(computations, entry, trips):
        total[kind] = total.get(kind, 0.0) + size
    hbm, network = total.pop("hbm", 0.0), total.pop("network", 0.0)
    return Moved(hbm, total, network)


def line(points: dict[int, Moved], layers: int) -> Moved:
    """Extrapolates from programs of two depths to one of `layers` layers."""
    (low, few), (high, more) = sorted(points.items())[:2]

    def at(a: float, b: float) -> float:
        return a + (layers - low) * (b - a) / (high - low)

    kinds = few.links.keys() | more.links.keys()
    links = {kind: at(few.links.get(kind, 0.0), more.links.get(kind, 0.0)) for kind in sorted(kinds)}
    return Moved(at(few.hbm, more.hbm), links, at(few.network, more.network))


# --- the text ---------------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the one that runs."""
    computations: dict[str, Computation] = {}
    entry, name, body, root = "", "", {}, None
    for row in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", row)
        if opened and " = " not in row.split("(")[0]:
            name, body, root = opened[2], {}, None
            entry = name if opened[1] else entry
        elif name and re.fullmatch(r"\}(, execution_thread=.*)?", row):
            computations[name] = Computation(body, root or list(body.values())[-1])
            name = ""
        elif name and re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", row):  # kernels go on over further lines
            found = _instruction(row)
            body[found.name] = found
            root = found if row.lstrip().startswith("ROOT ") else root
    return computations, entry


def _instruction(row: str) -> Instruction:
    left, right = row.split(" = ", 1)
    name = left.replace("ROOT ", "").strip().lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    start = right.index("(")
    stop = _closing(right, start)
    inside, opcode = right[start + 1 : stop], right[:start]
    operands = (inside,) if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, opcode, operands, right[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"HLO: a bracket does not close in {text[:80]!r}.")


def shape_bytes(shape: str, *, hbm_only: bool = False) -> float:
    """Bytes of a shape, of a tuple's parts together.

    Args:
        hbm_only: leave out what lies in another memory space, S(n) in the layout: on-chip memory, flags, the host.
    """
    total = 0.0
    for kind, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?", shape):
        if not (hbm_only and re.search(r"S\(\d+\)", layout)):
            total += _width(kind) * math.prod(int(d) for d in dims.split(",") if d) / 8
    return total


def _width(kind: str) -> int:
    """Bits of an element: bf16, f8e4m3fn, s32, c64, pred …"""
    digits = re.match(r"[a-z]+(\d+)", kind)
    return _BITS[kind] if kind in _BITS else int(digits[1]) if digits else 0


# --- walking it -------------------------------------------------------------------------------------------------------


def _walk(computations: dict[str, Computation], name: str, trips: int, seen: set | None = None) -> Iterator:
    """(kind, bytes) of everything a computation does; seen: channels of collectives inside fusions."""
    seen = set() if seen is None else seen
    here = computations[name]
    for one in here.instructions.values():
        if one.opcode == "while":
            turns = _turns(computations, here, one) or trips
            for part in ("body", "condition"):
                yield from ((k, turns * size) for k, size in _walk(computations, _called(one, part), trips, seen))
        elif one.opcode == "conditional":
            yield from _dearest(computations, one, trips, seen)
        elif one.opcode in ("call", "async-start"):
            yield from _walk(computations, _called(one, "to_apply") or _called(one, "calls"), trips, seen)
        else:
            yield from _links(computations, here, one, seen)
            yield "hbm", _traffic(computations, here, one)


def _dearest(computations: dict[str, Computation], one: Instruction, trips: int, seen: set) -> Iterator:
    branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
    names = names or [_called(one, f"{side}_computation") for side in ("true", "false")]
    every = [list(_walk(computations, name, trips, seen)) for name in names]
    yield from max(every, key=lambda parts: sum(size for _, size in parts))


def _called(one: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", one.rest)
    return found[1] if found else ""


def _turns(computations: dict[str, Computation], here: Computation, loop: Instruction) -> int:
    """How often a loop turns; 0 where the text does not say."""
    told = re.search(r'known_trip_count[^}]*?"?n"?:\s*"?(\d+)', loop.rest)
    if told:
        return int(told[1])
    condition = computations[_called(loop, "condition")].instructions
    root = computations[_called(loop, "condition")].root
    if root.opcode in ("and", "fusion"):
        return min(_limits(computations, condition, root), default=0)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return 0
    counter, limit = (condition.get(name) for name in root.operands[:2])
    if counter is None or limit is None or counter.opcode != "get-tuple-element":
        return 0
    index = int(re.search(r"index=(\d+)", counter.rest)[1])
    end, start = _constant(limit), _constant(_element(here, loop.operands[0], index))
    if end is None and limit.opcode == "get-tuple-element":
        end = _constant(_element(here, loop.operands[0], int(re.search(r"index=(\d+)", limit.rest)[1])))
    return 0 if end is None else max(end - (start or 0), 0)


def _limits(computations: dict[str, Computation], here: Mapping[str, Instruction], one: Instruction) -> Iterator[int]:
    """The constants that something has to stay below if an `and` of comparisons, possibly fused, is to hold."""
    if one.opcode == "fusion":
        inside, given = computations[_called(one, "calls")], [here.get(name) for name in one.operands]
        known = {
            part.name: given[int(part.operands[0])] if part.opcode == "parameter" else part
            for part in inside.instructions.values()
        }
        if inside.root.opcode in ("and", "compare"):
            yield from _limits(computations, known, inside.root)
    elif one.opcode == "and":
        for name in one.operands[:2]:
            if here.get(name) is not None:
                yield from _limits(computations, here, here[name])
    elif one.opcode == "compare" and "direction=LT" in one.rest:
        limit = _constant(here.get(one.operands[1]))
        if limit is not None:
            yield limit


def _element(here: Computation, name: str, index: int) -> Instruction | None:
    tuple_ = here.instructions.get(name)
    if tuple_ is None or tuple_.opcode != "tuple":
        return None
    found = here.instructions.get(tuple_.operands[index])
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = here.instructions.get(found.operands[0])
    return found


def _constant(one: Instruction | None) -> int | None:
    """The value of a scalar integer constant."""
    if one is None or one.opcode != "constant" or not one.operands[0].lstrip("-").isdigit():
        return None
    return int(one.operands[0])


def _operand_bytes(here: Computation, one: Instruction, **options: bool) -> float:
    return sum(shape_bytes(here.instructions[o].shape, **options) for o in one.operands if o in here.instructions)


def _links(computations: dict[str, Computation], here: Computation, one: Instruction, seen: set) -> Iterator:
    """What an instruction brings from other chips, fusions looked into."""
    kind = one.opcode.removesuffix("-start")
    if kind in _COLLECTIVES:
        yield kind, _COLLECTIVES[kind](_operand_bytes(here, one), group(one.rest))
    elif kind == "send" and "is_host_transfer=true" in one.rest:
        yield "network", _operand_bytes(here, one)
    elif kind == "fusion":
        inside = computations[_called(one, "calls")]
        for part in inside.instructions.values():
            channel = re.search(r"channel_id=(\d+)", part.rest)
            key = (part.opcode, channel[1] if channel else part.name)
            if part.opcode in _COLLECTIVES and key not in seen:
                seen.add(key)
                yield from _links(computations, inside, part, seen)
            elif part.opcode == "fusion":
                yield from _links(computations, inside, part, seen)


def group(rest: str) -> int:
    """Chips of a collective's group, in each of the ways in which groups are written."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if iota:
        return int(iota[2])
    named = re.search(r"replica_groups=(?:@\w+|mesh)\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2]))
    return 1


def _traffic(computations: dict[str, Computation], here: Computation, one: Instruction) -> float:
    """Bytes that an instruction reads from HBM and writes to it."""
    size = functools.partial(shape_bytes, hbm_only=True)
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode == "copy-start":  # (destination, source, flag)
        return size(one.shape)
    if one.opcode == "fusion":
        return _fusion_traffic(computations, here, one)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        source = here.instructions[one.operands[0]].shape
        return size(one.shape) + (shape_bytes(one.shape) if size(source) else 0.0)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = here.instructions[one.operands[-1 if one.opcode == "scatter" else 1]].shape
        return size(update) + (shape_bytes(update) if size(one.shape) else 0.0)
    if one.opcode.removesuffix("-start") in _COLLECTIVES:
        return _operand_bytes(here, one, hbm_only=True) + size(one.shape)
    if one.opcode == "custom-call" and re.search(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"', one.rest):
        return 0.0
    return _operand_bytes(here, one, hbm_only=True) + size(one.shape)


def _fusion_traffic(computations: dict[str, Computation], here: Computation, one: Instruction) -> float:
    """A fusion reads of an operand that it only slices the slices, and of one that it updates in place it writes the
    update."""
    inside = computations[_called(one, "calls")]
    total = 0.0
    for number, operand in enumerate(one.operands):
        whole = shape_bytes(here.instructions[operand].shape, hbm_only=True)
        total += min(whole, _read(computations, inside, number)) if whole else 0.0
    roots = [inside.root]
    if inside.root.opcode == "tuple":
        roots = [inside.instructions[name] for name in inside.root.operands]
    for root, shape in zip(roots, _split(one.shape)):
        root = _through(inside, root)
        if root.opcode == "dynamic-update-slice" and shape_bytes(shape, hbm_only=True):
            shape = inside.instructions[root.operands[1]].shape
        total += shape_bytes(shape, hbm_only=True)
    return total


def _read(computations: dict[str, Computation], inside: Computation, number: int) -> float:
    """Bytes that a fusion, with those in it, reads of its operand of this number."""
    part = next(p for p in inside.instructions.values() if p.opcode == "parameter" and p.operands[0] == str(number))
    whole, total, waiting = shape_bytes(part.shape), 0.0, [part]
    while waiting:
        now = waiting.pop()
        for user in (user for user in inside.instructions.values() if now.name in user.operands):
            first = user.operands[0] == now.name
            if user.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += shape_bytes(user.shape)
            elif user.opcode == "dynamic-update-slice" and first:
                continue  # in place
            elif user.opcode == "fusion":
                within = computations[_called(user, "calls")]
                total += sum(_read(computations, within, i) for i, o in enumerate(user.operands) if o == now.name)
            elif user.opcode in ("bitcast", "convert", "copy") and user is not inside.root:
                waiting.append(user)
            else:
                return whole
    return min(total, whole)


def _through(inside: Computation, root: Instruction) -> Instruction:
    """The instruction behind bitcasts."""
    while root.opcode in ("bitcast", "copy") and root.operands and root.operands[0] in inside.instructions:
        root = inside.instructions[root.operands[0]]
    return root


def _split(shape: str) -> list[str]:
    """The parts of a tuple's shape."""
    return re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", shape)
