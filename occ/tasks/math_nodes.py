"""Nodes of formulas (`math_numeric`), and how they are put together."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from occ.tasks.math_tokens import UnreadableError

Node = Any

MAX_BITS = 8192  # of a number that is written out
SCALAR = frozenset(
    ["num", "sym", "pi", "e", "i", "inf", "add", "mul", "pow", "fn", "app", "pm", "mp", "deg"]
)
ONE, MINUS = ("num", 1, 1), ("num", -1, 1)
INFINITY = ("inf",)


def number(value: Fraction | int) -> Node:
    """A number as a node.

    Raises:
      UnreadableError: it has more than some two thousand digits.
    """
    over, under = Fraction(value).numerator, Fraction(value).denominator
    if max(over.bit_length(), under.bit_length()) > MAX_BITS:
        raise UnreadableError("a number of thousands of digits")
    return ("num", over, under)


def literal(text: str) -> Fraction:
    """The number that digits with "(3)" for repeating ones and "e5" for an exponent denote."""
    digits, _, power = text.partition("e")
    digits, _, again = digits.partition("(")
    whole, _, places = digits.partition(".")
    value = Fraction(int(whole + places or "0"), 10 ** len(places))
    if again:
        again = again.rstrip(")")
        value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(places))
    return value * Fraction(10) ** int(power or 0)


def product(parts: list[Node]) -> Node:
    """Of formulas; numbers beside a matrix go into it.

    Raises:
      UnreadableError: a part is no formula.
    """
    if len(parts) == 1:
        return parts[0]
    matrices = [part for part in parts if part[0] == "matrix"]
    if len(matrices) == 1:
        scale = [part for part in parts if part[0] != "matrix"]
        rows = (tuple(product([*scale, cell]) for cell in row) for row in matrices[0][1:])
        return ("matrix", *rows)
    flat: list[Node] = []
    for part in parts:
        need_scalar(part)
        flat += part[1:] if part[0] == "mul" else [part]
    return ("mul", *flat)


def need_scalar(part: Node) -> None:
    """Raises for what is no formula.

    Raises:
      UnreadableError: it is a list, a set or the like.
    """
    if part[0] not in SCALAR:
        raise UnreadableError(f"a {part[0]} inside a formula")


def negative(part: Node) -> Node:
    """Minus a formula."""
    if part[0] == "num":
        return ("num", -part[1], part[2])
    if part[0] == "qty":
        return ("qty", negative(part[1]), part[2])
    return product([MINUS, part])


def quotient(over: Node, under: Node) -> Node:
    """Of two formulas."""
    need_scalar(under)
    if over[0] == under[0] == "num" and under[1]:
        return number(Fraction(over[1], over[2]) / Fraction(under[1], under[2]))
    return product([over, ("pow", under, MINUS)])


def mixed(whole: Node, part: Node) -> Node:
    """A whole number with a proper fraction after it.

    Raises:
      UnreadableError: the fraction is improper.
    """
    if part[0] != "num" or not 0 < part[1] < part[2]:
        raise UnreadableError("a number beside an improper fraction")
    return number(whole[1] + Fraction(part[1], part[2]))


def determinant(rows: list[list[Node]]) -> Node:
    """Of a square matrix of at most three rows."""
    size = len(rows)
    if size > 3 or size != len(rows[0]):
        raise UnreadableError("a determinant of another size")
    if size == 1:
        return rows[0][0]
    total: Node | None = None
    for column, cell in enumerate(rows[0]):
        minor = [[*row[:column], *row[column + 1 :]] for row in rows[1:]]
        part = product([cell, determinant(minor)])
        part = negative(part) if column % 2 else part
        total = part if total is None else add(total, part)
    return total


def add(first: Node, second: Node) -> Node:
    """Of two formulas, or two matrices of one shape."""
    if first[0] == second[0] == "matrix":
        if [len(row) for row in first[1:]] != [len(row) for row in second[1:]]:
            raise UnreadableError("a sum of matrices that do not fit")
        rows = zip(first[1:], second[1:], strict=True)
        return ("matrix", *(tuple(add(a, b) for a, b in zip(*pair, strict=True)) for pair in rows))
    need_scalar(first)
    need_scalar(second)
    return ("add", *(first[1:] if first[0] == "add" else [first]), second)


def without_degrees(value: Node) -> tuple[Node, bool]:
    """A formula without signs of degrees outside of functions, and whether it had one."""
    if value[0] == "deg":
        return value[1], True
    if value[0] not in ("add", "mul", "pm", "mp", "pow"):
        return value, False
    parts = [without_degrees(part) for part in value[1:]]
    return (value[0], *(part for part, _ in parts)), any(found for _, found in parts)
