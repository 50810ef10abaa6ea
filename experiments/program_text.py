"""What a compiled program costs, read from its text: XLA's own account counts the body of a loop once.

The text (`Compiled.as_text()`) is HLO after all passes: computations, each a list of instructions, called by `while`,
`fusion`, `conditional` and the like. Costs are summed from the entry on, a loop's as often as it runs. Of a
conditional's branches the one with the most bytes counts. A loop whose trips the text does not show counts once, and
`unknown_loops` says so.
"""

import collections
import dataclasses
import json
import math
import re

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
_FREE |= {"after-all", "partition-id", "replica-id", "copy-done", "all-reduce-done", "async-done", "opt-barrier"}

COUNTS = ("flops", "flops_highest", "flops_bfloat16", "bytes", "gathers", "scatters", "sorts", "collectives")
COUNTS += ("collective_bytes", "loop_steps", "kernels", "cycles", "unknown_loops")


@dataclasses.dataclass
class Instruction:
    """One line of a computation: its result's type, its operation, its operands' names and the rest of the line."""

    name: str
    type: str
    operation: str
    operands: list[str]
    rest: str
    root: bool


def costs(text: str) -> dict[str, float]:
    """Counts of a program, for one device.

    Returns:
      `flops` and `flops_highest` (of products and convolutions; the second: of those of full float32 precision),
      `flops_bfloat16` (of bfloat16 operands), `bytes` (read from and written to main memory by each kernel), `gathers`,
      `scatters`, `sorts`, `collectives`, `collective_bytes`, `loop_steps`, `kernels` (what runs one after the other),
      `cycles` (a TPU compiler's estimate), `unknown_loops`.
    """
    computations, entry = parse(text)
    known: dict[str, collections.Counter] = {}

    def total(name: str, fused: bool) -> collections.Counter:
        key = f"{name} {fused}"
        if key not in known:
            known[key] = _sum(name, fused)
        return known[key]

    def _sum(name: str, fused: bool) -> collections.Counter:
        found = collections.Counter()
        types = {i.name: i.type for i in computations[name]}
        for i in computations[name]:
            for key, value in _own(i, types, computations, fused).items():
                found[key] += value
            if i.operation == "while":
                body, condition = _called(i.rest, "body"), _called(i.rest, "condition")
                trips = _trips(i, condition[0], computations)
                found["unknown_loops"] += trips is None
                found["loop_steps"] += trips or 1
                for inner in (*body, *condition):
                    _add(found, total(inner, fused), trips or 1)
            elif i.operation == "conditional":
                branches = _called(i.rest, "branch_computations", "true_computation", "false_computation")
                _add(found, max((total(b, fused) for b in branches), key=lambda c: (c["bytes"], c["flops"])), 1)
            else:
                within = fused or i.operation == "fusion"
                for inner in _called(i.rest, "calls", *([] if i.operation != "call" else ["to_apply"])):
                    _add(found, total(inner, within), 1)
        return found

    return dict.fromkeys(COUNTS, 0) | dict(total(entry, False))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            root, name, type_, operation, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
            current.append(Instruction(name, type_, operation, operands, rest, bool(root)))
    return computations, entry


def _closing(rest: str) -> int:
    """Where the parenthesis of the operands ends."""
    depth = 1
    for n, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return n
    return len(rest)


def _add(total: collections.Counter, more: collections.Counter, times: int) -> None:
    for key, value in more.items():
        total[key] += times * value


def _called(rest: str, *attributes: str) -> list[str]:
    names = []
    for attribute in attributes:
        for one, several in re.findall(rf"\b{attribute}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", rest):
            names += [one] if one else [n.strip().lstrip("%") for n in several.split(",")]
    return names


def _trips(loop: Instruction, condition: str, computations: dict) -> int | None:
    """How often a loop runs: as the compiler noted, or the number that its counter stays below."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if noted:
        return int(noted[1])
    return _limit(condition, computations)


def _limit(name: str, computations: dict) -> int | None:
    """The constant that a condition's root says its counter is less than; None where the root is anything else."""
    inside = {i.name: i for i in computations[name]}
    root = next(i for i in computations[name] if i.root)
    if root.operation == "fusion":
        inner = _called(root.rest, "calls")[0]
        found = _limit(inner, computations)
        if found is not None:
            return found
        compare = next(i for i in computations[inner] if i.root)
        if compare.operation != "compare" or "direction=LT" not in compare.rest:
            return None
        # The constant may come from outside of the fusion.
        inner_names = {i.name: i for i in computations[inner]}
        last = inner_names.get(compare.operands[1])
        if last is None or last.operation != "parameter":
            return None
        limit = inside.get(root.operands[int(re.match(r"\d+", last.rest)[0])])
    elif root.operation == "compare" and "direction=LT" in root.rest:
        limit = inside.get(root.operands[1])
    else:
        return None
    if limit is None or limit.operation != "constant" or not limit.type.startswith(("s32[]", "u32[]", "s64[]")):
        return None
    return int(re.match(r"-?\d+", limit.rest)[0])


def _own(i: Instruction, types: dict, computations: dict, fused: bool) -> dict[str, float]:
    """What one instruction adds, apart from the computations that it calls."""
    operation = i.operation.removesuffix("-start")
    found: dict[str, float] = {}
    if operation in ("gather", "scatter", "sort"):
        found[f"{operation}s"] = 1
    if operation in ("dot", "convolution") or (operation == "custom-call" and "$" in i.rest):
        flops = _flops(i, types)
        kinds = [types.get(n, "") for n in i.operands]
        found["flops"] = flops
        if "highest" in i.rest.lower():
            found["flops_highest"] = flops
        elif any(k.startswith("bf16") for k in kinds):
            found["flops_bfloat16"] = flops
    cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
    if cycles:
        found["cycles"] = int(cycles[1])
    if fused or i.operation in _FREE:
        return found
    if operation in _COLLECTIVES:
        found |= {"collectives": 1, "collective_bytes": sum(size(types.get(n, "")) for n in i.operands)}
    found["kernels"] = 1
    found["bytes"] = _moved(i, types, computations)
    return found


def size(type_: str, everywhere: bool = True) -> float:
    """Bytes of a result's type; without `everywhere` those alone that lie in main memory (and not in a TPU's VMEM).

    >>> size("(f32[4,2]{1,0}, bf16[3]{0:S(1)})"), size("(f32[4,2]{1,0}, bf16[3]{0:S(1)})", everywhere=False)
    (38.0, 32.0)
    """
    return float(
        sum(
            _BYTES.get(kind, 0) * math.prod(_dimensions(shape))
            for kind, shape, layout in _ARRAY.findall(type_)
            if everywhere or "S(1)" not in layout
        )
    )


def _dimensions(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _shape(type_: str) -> list[int]:
    found = _ARRAY.search(type_)
    return _dimensions(found[2]) if found else []


def _moved(i: Instruction, types: dict, computations: dict) -> float:
    """Bytes that a kernel reads and writes; of what it only slices or gathers from, the part that it takes."""
    inner = computations.get(next(iter(_called(i.rest, "calls")), ""), []) if i.operation == "fusion" else []
    parameters = {re.match(r"\d+", p.rest)[0]: p for p in inner if p.operation == "parameter"}
    moved = 0.0
    for n, operand in enumerate(i.operands):
        whole = size(types.get(operand, ""), everywhere=False)
        users = [u for u in inner if str(n) in parameters and parameters[str(n)].name in u.operands]
        if i.operation in ("dynamic-slice", "slice", "gather") and n == 0:
            whole = min(whole, size(i.type))
        elif users and all(u.operation in ("dynamic-slice", "slice", "gather") for u in users):
            whole = min(whole, sum(size(u.type) for u in users))
        elif users and all(u.operation == "dynamic-update-slice" for u in users):
            whole = 0.0  # changed in place
        moved += whole
    written = size(i.type, everywhere=False)
    root = next((u for u in inner if u.root), i)
    if root.operation == "dynamic-update-slice":
        where = {u.name: u.type for u in inner} or types
        written = min(written, size(where.get(root.operands[1], "")))
    return moved + written


def _flops(i: Instruction, types: dict) -> float:
    """2 x multiplications of a product or a convolution."""
    shapes = [_shape(types.get(n, "")) for n in i.operands[:2]]
    out = math.prod(_shape(i.type))
    if i.operation == "dot":
        contracted = _dimensions(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1])
        return 2.0 * out * math.prod(shapes[0][d] for d in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if labels and "$convBackward" in i.rest:  # cuDNN's: labels are those of the convolution that it belongs to
        filtered = "$convBackwardFilter" in i.rest
        output, kernel = (shapes[1], _shape(i.type)) if filtered else (shapes[0], shapes[1])
        return 2.0 * math.prod(output) * math.prod(n for n, label in zip(kernel, labels[2]) if label != "o")
    if labels:
        kernel = math.prod(n for n, label in zip(shapes[1], labels[2]) if label != "o")
        return 2.0 * out * kernel
    noted = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', i.rest)
    if noted:
        return 2.0 * out * math.prod(shapes[0][int(d)] for d in json.loads(noted[1]))
    return 0.0
