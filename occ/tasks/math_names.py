"""Names that an answer gives to what it found: "x = 5", "f(x) = 2x", "a = 1, b = 2"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from occ.tasks.math_nodes import MINUS
from occ.tasks.math_numeric import nodes

Node = Any


def is_name(value: Node) -> bool:
    """Whether a left side is but a name: x, f(x), AB, |AB|."""
    if value[0] == "fn" and value[1] == "abs":
        value = value[2]
    if value[0] == "mul":
        return all(part[0] == "sym" and part[1][0].isupper() for part in value[1:])
    if value[0] == "tuple":
        return all(part[0] == "sym" for part in value[2:])
    return value[0] in ("sym", "app")


def by_name(value: Node) -> Node:
    """A tuple of names and values as a list, "a = 2, b = 5"; else the value as it is."""
    if value[0] != "rel" or value[1] != ("=",) or len(value) != 4:
        return value
    names, values = value[2:]
    if not names[0] == values[0] == "tuple" or len(names) != len(values) or not is_name(names):
        return value
    pairs = zip(names[2:], values[2:], strict=True)
    return ("list", (",",) * (len(names) - 3), *(("rel", ("=",), *pair) for pair in pairs))


def has_variables(value: Node) -> bool:
    """Whether a formula depends on anything."""
    return any(node[0] in ("sym", "app") for node in nodes(value))


def is_sought(value: Node, beside: Node) -> bool:
    """Whether an answer names what it found: "a + b = 5", of variables alone."""
    heads = {node[0] for node in nodes(value)}
    if (
        value == ("e",)
        or value == ("i",)
        or not heads <= {"sym", "add", "mul", "pow", "num", "app"}
    ):
        return False
    numbers = [node for node in nodes(value) if node[0] == "num"]
    return not has_variables(beside) and "sym" in heads and all(node == MINUS for node in numbers)


def assigned_names(parts: Sequence[Node]) -> list[str]:
    """Names of "x = 1, y = 2", if all parts are such and no name is there twice."""
    if not all(part[0] == "rel" and part[1] == ("=",) and is_name(part[2]) for part in parts):
        return []
    names = [repr(part[2]) for part in parts]
    return names if len(set(names)) == len(names) > 1 else []
