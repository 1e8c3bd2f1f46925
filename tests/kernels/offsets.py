"""Finds addresses that overflow: in Triton's own intermediate form, products of 32 bits that grow with a matrix.

    narrow_products(ttir)   ->  ["x: %at_23 = arith.muli %row_7, %columns : tensor<32xi32>", ...]

A matrix of 2^31 elements has fewer rows than that, so a row's number fits 32 bits and its offset, the number times the
columns, does not. An index is whatever grows with a matrix: an argument, a program's number, what was loaded, a loop's
counter. Two of them multiplied in 32 bits are wrong where the result is added to a pointer, also if it is widened on
the way. An index times what a tile bounds (a constant, a range, the lesser of it and anything) is not.

Scales are left out: they are 1/128 as many as codes, and 2^31 of them would take 8 GB beside 275 GB of codes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_DEFINED = re.compile(r"^\s*(%[\w]+)(?::\d+)? = (\"?[\w.]+\"?)(.*?)(?: loc\(.*)?$")
_USED = re.compile(r"%\w+(?:#\d+)?")
# Bounded where all of their operands are.
_BOUNDED = {
    *("arith.addi", "arith.subi", "arith.muli", "arith.divsi"),
    *("tt.splat", "tt.broadcast", "tt.expand_dims"),
}
_CARRIED = re.compile(r"(%\w+) = (%\w+(?:#\d+)?)")


@dataclass(frozen=True, slots=True)
class Value:
    """What defines a value of the program: the operation, its operands, and its line."""

    operation: str
    operands: tuple[str, ...]
    line: str


def narrow_products(ttir: str) -> list[str]:
    """Products of two indices in 32 bits that an address is computed from, each with the pointer that it is for."""
    values = dict(_values(ttir))
    found = []
    for value in values.values():
        if value.operation == "tt.addptr":
            pointer = _pointer(value.operands[0], values)
            if "scales" not in pointer:
                found += [f"{pointer}: {line}" for line in _narrow(value.operands[1], values, set())]
    return sorted(set(found))


def _values(ttir: str) -> Iterator[tuple[str, Value]]:
    for line in ttir.splitlines():
        if not (match := _DEFINED.match(line)):
            continue
        name, operation, rest = match[1], match[2].strip('"'), match[3]
        text = f"{name} = {operation}{rest}"
        if operation != "scf.for":
            yield name, Value(operation, tuple(_USED.findall(rest)), text)
            continue
        counter, _, carried = rest.partition("iter_args")
        (index, first), *pairs = [*_CARRIED.findall(counter), *_CARRIED.findall(carried)]
        yield index, Value("counter", (first,), text)
        for place, (inner, start) in enumerate(pairs):
            yield inner, Value("carried", (start,), text)
            yield f"{name}#{place}", Value("carried", (start,), text)
            yield name, Value("carried", (start,), text)


def _pointer(name: str, values: dict[str, Value]) -> str:
    """The argument that a pointer came from."""
    while name in values:
        if not values[name].operands:
            return name
        name = values[name].operands[0]
    return name


def _narrow(name: str, values: dict[str, Value], seen: set[str]) -> Iterator[str]:
    """The lines that multiply two indices in 32 bits on the way to a value."""
    if name in seen or name not in values:
        return
    seen.add(name)
    value = values[name]
    if value.operation == "arith.muli":
        if re.search(r"\bi64$|xi64>$", value.line):
            return  # What it multiplies are numbers of rows and columns.
        if not any(_is_bounded(operand, values) for operand in value.operands):
            yield value.line
    # What was loaded or compared is a number of its own, and what was divided counted tiles.
    if value.operation not in ("tt.load", "tt.addptr", "arith.cmpi", "arith.divsi", "arith.remsi"):
        for operand in value.operands:
            yield from _narrow(operand, values, seen)


def _is_bounded(name: str, values: dict[str, Value]) -> bool:
    """Whether a value is bounded when the kernel is compiled, as what counts within a tile is."""
    if name not in values:
        return False
    value = values[name]
    match value.operation:
        case "arith.constant" | "tt.make_range":
            return True
        case "arith.minsi" | "arith.remsi" | "arith.andi":
            return any(_is_bounded(operand, values) for operand in value.operands)
        case (
            "arith.addi" | "arith.muli" | "arith.divsi" | "arith.subi" | "tt.splat" | "tt.broadcast" | "tt.expand_dims"
        ):
            return all(_is_bounded(operand, values) for operand in value.operands)
        case _:
            return False
