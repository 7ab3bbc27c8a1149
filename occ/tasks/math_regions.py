"""Sets of real numbers, however an answer describes them: intervals, inequalities, unions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from occ.tasks.math_names import is_name
from occ.tasks.math_nodes import INFINITY, negative, number
from occ.tasks.math_numeric import TooLargeError, exact

Node = Any


def flattened(value: Node) -> Node:
    """A union of finite sets as one."""
    if value[0] == "union" and all(part[0] == "set" for part in value[1:]):
        return ("set", *itertools.chain.from_iterable(part[1:] for part in value[1:]))
    return value


class Region:
    """A union of intervals ("interval", closed below, closed above, low, high) of a variable."""

    def __init__(self, intervals: Sequence[Node], variable: Node = None):
        self.intervals, self.variable = list(intervals), variable


def reals(value: Node) -> Region | None:
    """The set of real numbers that a value describes, if it is one."""
    head = value[0]
    if head == "tuple" and len(value) == 4 and value[1] != "<>":
        return Region([("interval", value[1][0] == "[", value[1][1] == "]", *value[2:])])
    if head == "rel":
        return _of_relation(value)
    if head == "list" and all(part[0] == "rel" for part in value[2:]):
        left_out = [part for part in value[2:] if part[1] == ("!=",)]
        if left_out and len(left_out) >= len(value) - 3 and "or" not in value[1]:
            return _without_names(value[2:], left_out)
        return _of_relations(value[1], [reals(part) or _equated(part) for part in value[2:]])
    if head == "union":
        parts = [_points(part) or reals(part) for part in value[1:]]
        return None if None in parts else _joined(parts)  # type: ignore[arg-type]
    if head == "diff":
        return _without_points(reals(value[1]), value[2])
    return None


def describes(value: Node) -> bool:
    """Whether a value can only be a set of real numbers: an inequality, a union."""
    if value[0] == "list":
        return any(describes(part) for part in value[2:])
    inequality = value[0] == "rel" and any(sign[0] in "<>!" for sign in value[1])
    return value[0] in ("union", "diff") or inequality


def _points(value: Node) -> Region | None:
    if value[0] != "set":
        return None
    return Region([("interval", True, True, part, part) for part in value[1:]])


def _equated(value: Node) -> Region | None:
    if value[1] != ("=",) or not is_name(value[2]):
        return None
    return Region([("interval", True, True, value[3], value[3])], value[2])


def _joined(regions: Sequence[Region]) -> Region:
    """A union; a point at an open end closes it."""
    intervals: list[Node] = []
    points: list[Node] = []
    for interval in itertools.chain.from_iterable(region.intervals for region in regions):
        (points if interval[3] == interval[4] else intervals).append(interval)
    for point in points:
        for place, (_, low, high, a, b) in enumerate(intervals):
            if point[3] in (a, b):
                intervals[place] = ("interval", low or a == point[3], high or b == point[3], a, b)
                break
        else:
            intervals.append(point)
    variables = [region.variable for region in regions if region.variable is not None]
    return Region(intervals, variables[0] if variables else None)


def _of_relation(value: Node) -> Region | None:
    signs, sides = value[1], value[2:]
    if signs == ("in",):
        region = reals(sides[1])
        return None if region is None else Region(region.intervals, sides[0])
    if signs == ("!=",) and is_name(sides[0]):
        return Region(
            [
                ("interval", False, False, negative(INFINITY), sides[1]),
                ("interval", False, False, sides[1], INFINITY),
            ],
            sides[0],
        )
    if any(sign[0] != signs[0][0] or sign[0] not in "<>" for sign in signs) or len(sides) > 3:
        return None
    if signs[0][0] == ">":
        signs, sides = tuple(sign.replace(">", "<") for sign in signs[::-1]), sides[::-1]
    closed = [sign == "<=" for sign in signs]
    if len(sides) == 2:
        around = _around_zero(sides, closed[0])
        if around is not None:
            return around
    if len(sides) == 3 and is_name(sides[1]):
        return Region([("interval", *closed, sides[0], sides[2])], sides[1])
    if len(sides) == 2 and is_name(sides[0]):
        return Region([("interval", False, closed[0], negative(INFINITY), sides[1])], sides[0])
    if len(sides) == 2 and is_name(sides[1]):
        return Region([("interval", closed[0], False, sides[0], INFINITY)], sides[1])
    return None


def _around_zero(sides: Sequence[Node], closed: bool) -> Region | None:
    """|x| < a, or a < |x|, of a variable."""
    for place, side in enumerate(sides):
        if side[:2] == ("fn", "abs") and side[2][0] == "sym" and side[2][1].islower():
            bound = sides[1 - place]
            if place == 0:
                return Region([("interval", closed, closed, negative(bound), bound)], side[2])
            below = ("interval", False, closed, negative(INFINITY), negative(bound))
            return Region([below, ("interval", closed, False, bound, INFINITY)], side[2])
    return None


def _of_relations(separators: Sequence[str], regions: Sequence[Region | None]) -> Region | None:
    """Several relations: "or" joins them, "and" intersects a bound below with one above."""
    if None in regions:
        return None
    known: list[Region] = regions  # type: ignore[assignment]
    if len({repr(region.variable) for region in known}) > 1:
        return None
    if len(known) == 2 and "or" not in separators and all(len(r.intervals) == 1 for r in known):
        first, second = (region.intervals[0] for region in known)
        if second[3] != negative(INFINITY):
            first, second = second, first
        if first[4] == INFINITY and second[3] == negative(INFINITY):
            bounds = rational(first[3]), rational(second[4])
            overlap = None not in bounds and bounds[0] < bounds[1]  # type: ignore[operator]
            if "and" in separators or overlap:
                both = ("interval", first[1], second[2], first[3], second[4])
                return Region([both], known[0].variable)
    return _joined(known)


def rational(value: Node) -> Fraction | None:
    """The rational number that a value is, if it is one of bounded size."""
    try:
        return exact(value)
    except TooLargeError:
        return None


def _without_names(parts: Sequence[Node], left_out: Sequence[Node]) -> Region | None:
    """One set, or all numbers, but for points: 0 < x < 2, x != 1."""
    line = Region([("interval", False, False, negative(INFINITY), INFINITY)], left_out[0][2])
    (whole,) = [reals(part) for part in parts if part not in left_out] or [line]
    if whole is None or any(part[2] != whole.variable for part in left_out):
        return None
    return _without_points(whole, ("set", *(part[3] for part in left_out)))


def _without_points(region: Region | None, points: Node) -> Region | None:
    """An interval without points inside it."""
    if region is None or len(region.intervals) != 1 or points[0] != "set":
        return None
    inside = points[1:]
    if len(inside) > 1:
        values = [rational(point) for point in inside]
        if None in values:
            return None
        inside = [number(value) for value in sorted(set(values))]  # type: ignore
    _, low, high, a, b = region.intervals[0]
    ends = [a, *inside, b]
    parts = []
    for place, (left, right) in enumerate(itertools.pairwise(ends)):
        closed = low if place == 0 else False, high if place == len(inside) else False
        parts.append(("interval", *closed, left, right))
    return Region(parts, region.variable)
