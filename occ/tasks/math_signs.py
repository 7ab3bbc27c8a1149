"""Plus-or-minus, written out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from occ.tasks.math_nodes import negative, number
from occ.tasks.math_numeric import nodes

Node = Any

MAX_SIGNS = 3  # in one answer, each for itself


def with_signs(one: Node, other: Node) -> list[tuple[Node, Node]]:
    """Both with every plus-or-minus written out: all signs together, and each for itself."""
    sides = []
    for value in (one, other):
        count = _count_signs(value)
        if not count:
            sides.append([value])
            continue
        choices = [[(True,) * count, (False,) * count]]
        if 1 < count <= MAX_SIGNS:
            choices.append(list(itertools.product((True, False), repeat=count)))
        sides.append([_spread(value, choice) for choice in choices])
    return list(itertools.product(*sides))


def _count_signs(value: Node) -> int:
    return sum(node[0] in ("pm", "mp") for node in nodes(value))


def _spread(value: Node, choices: Sequence[tuple[bool, ...]]) -> Node:
    if value[0] in ("list", "set"):
        first = 2 if value[0] == "list" else 1
        parts: list[Node] = []
        for part in value[first:]:
            count = _count_signs(part)
            here = list(dict.fromkeys(choice[:count] for choice in choices)) if count else [()]
            parts += [_signed(part, iter(choice)) for choice in here]
        return (
            ("list", (",",) * (len(parts) - 1), *parts) if value[0] == "list" else ("set", *parts)
        )
    parts = list(dict.fromkeys(_signed(value, iter(choice)) for choice in choices))
    return ("list", (",",) * (len(parts) - 1), *parts) if len(parts) > 1 else parts[0]


def _signed(node: Node, signs: Any) -> Node:
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] not in ("pm", "mp"):
        return tuple(_signed(part, signs) for part in node)
    plus = next(signs) == (node[0] == "pm")
    first, second = (_signed(part, signs) for part in node[1:])
    second = second if plus else negative(second)
    return second if first == number(0) else ("add", first, second)
