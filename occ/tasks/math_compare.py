"""Whether two values that were read (`math_reading`) are one, by their structure.

Lists have no order but count how often a part stands in them, sets do not count, tuples have an
order. Names and units may be left out on one side, and must agree where both have them. Formulas
are compared by a function that the caller gives; it may leave a pair open (None), and then so is
what depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from occ.tasks import math_units
from occ.tasks.math_names import assigned_names, by_name, has_variables, is_name, is_sought
from occ.tasks.math_nodes import INFINITY, SCALAR, negative, number
from occ.tasks.math_numeric import exact, nodes
from occ.tasks.math_regions import Region, describes, flattened, rational, reals
from occ.tasks.math_signs import with_signs

Node = Any
Equal = Callable[[Node, Node], "bool | None"]

_NO_SOLUTION = {"nosolution", "nosolutions", "none", "noreal", "norealsolutions", "empty"}


def _same_words(one: str, other: str) -> bool:
    """Equal but for a plural; or both say that there is nothing."""
    return one.removesuffix("s") == other.removesuffix("s") or {one, other} <= _NO_SOLUTION


def compare(expected: Sequence[Node], found: Sequence[Node], equal: Equal) -> bool | None:
    """Whether one reading of the answer is one of the reference; None where `equal` leaves it open.

    Args:
      expected, found: of `math_reading.read`.
      equal: of two formulas.
    """
    comparison = _Comparison(equal)
    return any_of(
        comparison.same(*signed)
        for one in expected
        for other in found
        for signed in with_signs(one, other)
    )


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """False if any is, else None if any is open."""
    seen = set(verdicts)
    return False if False in seen else None if None in seen else True


def any_of(verdicts: Iterable[bool | None]) -> bool | None:
    """True if any is, else None if any is open."""
    opened = False
    for verdict in verdicts:
        if verdict:
            return True
        opened = opened or verdict is None
    return None if opened else False


class _Comparison:
    def __init__(self, equal: Equal):
        self.equal = equal

    def same(self, one: Node, other: Node) -> bool | None:
        """Whether two values are one."""
        one, other = flattened(one), flattened(other)
        if one == other:
            return True
        if one[0] == "list" or other[0] == "list":
            one, other = by_name(one), by_name(other)
        regions = (reals(one), reals(other)) if describes(one) or describes(other) else (None,)
        if None not in regions:
            return self.regions(*regions)
        heads = (one[0], other[0])
        for head, method in self._ORDER:
            if head in heads:
                verdict = method(self, one, other)
                if verdict is not NotImplemented:
                    return verdict  # type: ignore[return-value]
        if one[0] in SCALAR and other[0] in SCALAR:
            return self.equal(one, other)
        return False

    # -- words and choices

    def choices(self, one: Node, other: Node) -> bool | None:
        """A letter of a choice, with or without what it stands for."""
        if one[0] != "choice":
            one, other = other, one
        letter, value = one[1], one[2]
        if other[0] == "choice":
            if letter.lower() != other[1].lower():
                return False
            if value is None or other[2] is None:
                return True
            return self.same(value, other[2])
        if other[0] == "sym" and other[1] == letter:
            return True
        return False if value is None else self.same(value, other)

    def words(self, one: Node, other: Node) -> bool | None:
        """Words beside words, or a name."""
        if one[0] != "words":
            one, other = other, one
        if other[0] == "words":
            return _same_words(one[1], other[1])
        if other[0] == "sym":
            return bool(one[1] == other[1].replace(" ", "").lower() and len(one[1]) > 1)
        if other[0] == "mul" and all(len(part) < 3 for part in other[1:]):
            return bool(one[1] == "".join(part[-1] for part in other[1:]).lower())
        return other == ("set",) and one[1] in _NO_SOLUTION

    # -- names and relations

    def relations(self, one: Node, other: Node) -> bool | None:
        """Where one or both are relations."""
        if one[0] == other[0] == "rel":
            return self.two_relations(one, other)
        relation, value = (one, other) if one[0] == "rel" else (other, one)
        if value[0] in ("list", "set") and relation[1] != ("in",):
            return NotImplemented
        return self.named(relation, value, is_reference=one[0] == "rel")

    def named(self, relation: Node, value: Node, *, is_reference: bool) -> bool | None:
        """A relation beside what is none: "x = 5" and 5, "2 * 6 = 12" and 12."""
        signs, sides = relation[1], relation[2:]
        if not set(signs) <= {"=", "~", "in"}:
            return False
        if is_name(sides[0]) or (not is_reference and is_sought(sides[0], value)):
            signs, sides = signs[1:], sides[1:]
        elif "in" in signs:
            return False
        exactly = signs.index("~") if "~" in signs else len(signs)
        sides = sides[: exactly + 1]
        chain = all_of(self.same(sides[0], side) for side in sides[1:])
        pair = (sides[-1], value) if is_reference else (value, sides[-1])
        return all_of([chain, self.same(*pair)])

    def two_relations(self, one: Node, other: Node) -> bool | None:
        """Where both are."""
        formulas = all(side[0] in SCALAR for side in (*one[2:], *other[2:]))
        if len(one) == len(other) == 4 and formulas and one[1] != ("in",):
            return self.equations(one, other)
        # "S = ab/2 = 6" and "S = 6"
        if one[2] != other[2] or not set(one[1] + other[1]) <= {"=", "in"}:
            return False
        return self.same(one[-1], other[-1])

    def equations(self, one: Node, other: Node) -> bool | None:
        """Two equations or inequalities: one is a multiple of the other."""
        signs, differences = [], []
        for _, (sign,), left, right in (one, other):
            if sign in (">", ">="):
                sign, left, right = sign.replace(">", "<"), right, left
            signs.append(sign)
            differences.append(("add", left, negative(right)))
        if signs[0] != signs[1] or any(part == INFINITY for d in differences for part in nodes(d)):
            return False
        first, second = differences
        if not has_variables(first) or not has_variables(second):
            return False
        if signs[0] not in ("=", "!="):
            return self.equal(first, second)
        at = [_substituted(difference) for difference in differences]
        nonzero = [self.equal(difference, number(0)) for difference in (*differences, *at)]
        multiple = self.equal(("mul", first, at[1]), ("mul", second, at[0]))
        if True in nonzero:
            return False
        return None if None in nonzero else multiple

    # -- sets of real numbers

    def regions(self, one: Region, other: Region) -> bool | None:
        """Sets of real numbers, of one variable where both name it."""
        if None not in (one.variable, other.variable) and one.variable != other.variable:
            return False
        return self.bags(one.intervals, other.intervals)

    # -- several parts

    def lists(self, one: Node, other: Node) -> bool | None:
        """Where one or both have several parts."""
        if one[0] == "tuple" or other[0] == "tuple":
            return self.assigned(one, other)
        if one[0] not in ("list", "set") or other[0] not in ("list", "set"):
            several, single = (one, other) if one[0] in ("list", "set") else (other, one)
            parts = _parts(several)
            if len(parts) != 1:
                return False
            return self.same(parts[0], single) if several is one else self.same(single, parts[0])
        first, second = _parts(one), _parts(other)
        names = assigned_names(first), assigned_names(second)
        if names[0] and names[1]:
            if set(names[0]) != set(names[1]):
                return False
            order = [names[1].index(name) for name in names[0]]
            return all_of(map(self.same, first, [second[place] for place in order]))
        if (names[0] or names[1]) and len(first) == len(second):
            return all_of(map(self.same, first, second))
        if one[0] == other[0] == "set":
            matches = [[self.same(a, b) for b in second] for a in first]
            columns = zip(*matches, strict=True)
            rows = [*matches, *columns] if first and second else []
            return all_of([bool(first) == bool(second), *map(any_of, rows)])
        return self.bags(first, second)

    def assigned(self, one: Node, other: Node) -> bool | None:
        """A tuple beside "x = 1, y = 2": in the order of the names."""
        several, pair = (one, other) if one[0] in ("list", "set") else (other, one)
        if several[0] not in ("list", "set"):
            return NotImplemented
        parts = _parts(several)
        if len(parts) == 1:
            return self.same(parts[0], pair)
        names = assigned_names(parts)
        if not names or len(parts) != len(pair) - 2 or pair[1] != "()":
            return False
        ordered = [part for _, part in sorted(zip(names, parts, strict=True))]
        return all_of(map(self.same, ordered, pair[2:]))

    def bags(self, one: Sequence[Node], other: Sequence[Node]) -> bool | None:
        """Without order, each part as often as there."""
        if len(one) != len(other):
            return False
        left = list(other)
        opened = []
        for part in one:
            verdicts = [self.same(part, candidate) for candidate in left]
            if True in verdicts:
                del left[verdicts.index(True)]
            elif None in verdicts:
                opened.append(part)
            else:
                return False
        return None if opened else True

    def intervals(self, one: Node, other: Node) -> bool | None:
        """By their ends."""
        if one[0] != other[0] or one[1:3] != other[1:3]:
            return False
        return all_of(map(self.same, one[3:], other[3:]))

    def tuples(self, one: Node, other: Node) -> bool | None:
        """In order; a column is a tuple too."""
        sides = []
        for value in (one, other):
            if value[0] == "matrix" and all(len(row) == 1 for row in value[1:]):
                value = ("tuple", "()", *(row[0] for row in value[1:]))
            sides.append(value)
        first, second = sides
        if first[0] != "tuple" or second[0] != "tuple" or len(first) != len(second):
            return NotImplemented if "qty" in (first[0], second[0]) else False
        if first[1].replace("<>", "()") != second[1].replace("<>", "()"):
            return False
        return all_of(map(self.same, first[2:], second[2:]))

    def matrices(self, one: Node, other: Node) -> bool | None:
        """Cell by cell."""
        if one[0] != other[0] or [len(r) for r in one[1:]] != [len(r) for r in other[1:]]:
            return NotImplemented if "tuple" in (one[0], other[0]) else False
        cells = zip(one[1:], other[1:], strict=True)
        return all_of(self.same(a, b) for rows in cells for a, b in zip(*rows, strict=True))

    # -- numbers with something beside them

    def ratios(self, one: Node, other: Node) -> bool | None:
        """Ratios and times of day."""
        first, second = (_as_ratio(value) for value in (one, other))
        if one[0] == other[0] == "time":
            return _same_time(one, other)
        if first is None or second is None or len(first) != len(second):
            return False
        return all_of(
            self.equal(("mul", a, second[0]), ("mul", b, first[0]))
            for a, b in zip(first[1:], second[1:], strict=True)
        )

    def bases(self, one: Node, other: Node) -> bool | None:
        """Numbers in a base, which the answer may leave out."""
        if one[0] == other[0]:
            return int(one[1], one[2]) == int(other[1], other[2])
        if one[0] == "base":  # the answer may leave the base out
            return bool(other == number(int(one[1])))
        return bool(other[2] == 10 and one == number(int(other[1])))

    def congruences(self, one: Node, other: Node) -> bool | None:
        """Residues."""
        if one[0] != other[0]:
            residue, plain = (one, other) if one[0] == "cong" else (other, one)
            values = [exact(residue[1]), exact(residue[2])]
            if None in values or not 0 <= values[0] < values[1]:  # type: ignore[operator]
                return False
            return self.same(residue[1], plain)
        values = [exact(part) for part in (one[1], other[1], one[2], other[2])]
        if None in values:
            return all_of([self.same(one[1], other[1]), self.same(one[2], other[2])])
        return values[2] == values[3] and (values[0] - values[1]) % values[2] == 0  # type: ignore

    def quantities(self, one: Node, other: Node) -> bool | None:
        """Numbers where one or both have units."""
        (a, unit), (b, other_unit) = (
            value[1:] if value[0] == "qty" else (value, math_units.NONE) for value in (one, other)
        )
        if unit[1] and other_unit[1]:
            if unit[1] != other_unit[1]:
                return self.angles(a, unit, b, other_unit)
            return self.same(_scaled(a, unit[0]), _scaled(b, other_unit[0]))
        if unit[1]:
            return self.with_and_without(a, unit, _scaled(b, other_unit[0]))
        if other_unit[1] == (("%", 1),):
            # Beside a number, 50 % is 50 or 0.5, but 0.5 % is not 0.5.
            known = rational(b)
            if known is not None and abs(known) <= 1:
                return self.same(_scaled(a, unit[0]), _scaled(b, Fraction(1, 100)))
        if other_unit[1]:
            return self.with_and_without(b, other_unit, _scaled(a, unit[0]))
        return self.same(_scaled(a, unit[0]), _scaled(b, other_unit[0]))

    def angles(
        self, a: Node, unit: math_units.Unit, b: Node, other: math_units.Unit
    ) -> bool | None:
        """Degrees beside radians."""
        names = [found[1][0][0] for found in (unit, other)]
        if sorted(names) != ["degree", "radian"] or a[0] not in SCALAR or b[0] not in SCALAR:
            return False
        sides = [
            ("deg", value) if name == "degree" else value
            for value, name in zip((a, b), names, strict=True)
        ]
        return self.equal(*sides)

    def with_and_without(self, size: Node, unit: math_units.Unit, bare: Node) -> bool | None:
        """A number with a unit, and one without."""
        verdicts = [self.same(size, bare)]
        if unit[1] == (("%", 1),):
            verdicts.append(self.same(_scaled(size, Fraction(1, 100)), bare))
        elif unit[1] == (("degree", 1),) and size[0] in SCALAR:
            if any(node == ("pi",) for node in nodes(bare)) and ("pi",) not in nodes(size):
                verdicts.append(self.same(("deg", size), bare))
        elif bare[0] == "mul" and bare[-1][0] == "sym" and math_units.word(bare[-1][1]) == unit:
            # "5 m" where m might have been a variable
            rest = bare[1] if len(bare) == 3 else bare[:-1]
            verdicts.append(self.same(size, rest))
        return any_of(verdicts)

    _ORDER = (
        ("choice", choices),
        ("words", words),
        ("rel", relations),
        ("list", lists),
        ("set", lists),
        ("interval", intervals),
        ("qty", quantities),
        ("ratio", ratios),
        ("time", ratios),
        ("base", bases),
        ("cong", congruences),
        ("matrix", matrices),
        ("tuple", tuples),
    )


def _parts(value: Node) -> tuple[Node, ...]:
    return tuple(value[2:] if value[0] == "list" else value[1:])


def _scaled(value: Node, scale: Fraction) -> Node:
    return value if scale == 1 or value[0] not in SCALAR else ("mul", number(scale), value)


def _substituted(node: Node) -> Node:
    """With numbers for variables."""
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] == "sym":
        digits = sum(ord(letter) * 7**place for place, letter in enumerate(node[1]))
        return number(Fraction(digits % 997 + 2, 31))
    return tuple(_substituted(part) for part in node)


def _as_ratio(value: Node) -> tuple[Node, ...] | None:
    if value[0] == "ratio":
        return tuple(value[1:])
    if value[0] == "time" and not value[2]:
        return number(value[1] // 60), number(value[1] % 60)
    return (value, number(1)) if value[0] in SCALAR else None


def _same_time(one: Node, other: Node) -> bool:
    if one[1] == other[1]:
        return not (one[2] and other[2]) or one[2] == other[2]
    if (not one[2]) == (not other[2]) or one[1] % 720 != other[1] % 720:
        return False
    return (other if one[2] else one)[1] < 13 * 60
