"""Whether two formulas have one value: exactly where both are rational, else at many digits.

A formula is a tree of nested tuples (or lists, as JSON gives them back), its head first:

  ("num", p, q)  the fraction p / q        ("sym", name)    a variable
  ("pi",) ("e",) ("i",) ("inf",)           constants
  ("add", a, b, ...)  ("mul", a, b, ...)  ("pow", a, b)
  ("fn", name, a, ...)  a known function   ("app", name, a, ...)  an unknown one, as f(x)
  ("pm", a, b)  ("mp", a, b)               a plus or minus b; `math_compare` expands them
  ("deg", a)                               a in degrees

Formulas with variables are compared at points that are drawn from the variables' names: two that
agree to 80 digits at each are one function. Points where one of the two leaves the real numbers say
nothing, unless all do. Nothing is simplified and no text is evaluated, so the time is bounded by
the size of the tree; values too large to be computed are refused.

Worker processes load this file by its path (`occ.tasks.workers`): it imports nothing of the
package.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from occ.extras import require

require("math", __name__, "mpmath")
import mpmath

Node = Any  # a tree as above

DIGITS = 150  # computed
AGREE = 80  # of them must agree
EXACT_BITS = 2**15  # of numerator and denominator; larger rationals are equal only as text
MAX_LOG = 1e12  # natural logarithm of a value
MAX_ARGUMENT = 1e30  # of functions that reduce it


class UndefinedError(Exception):
    """The formula has no value there, as 1 / 0."""


class TooLargeError(Exception):
    """Its value cannot be computed in bounded time."""


# -- exactly ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def exact(node: Node) -> Fraction | None:
    """The rational number that a formula of rational numbers is; None for others.

    Raises:
      TooLargeError: it is rational, and too large.

    >>> exact(("add", ("num", 1, 2), ("pow", ("num", 4, 1), ("num", 1, 2))))
    Fraction(5, 2)
    """
    head, *rest = node
    if head == "num":
        return Fraction(rest[0], rest[1])
    if head == "add" or head == "mul":
        parts = [exact(part) for part in rest]
        if None in parts:
            return None
        value = Fraction(head == "mul")
        for part in parts:
            value = _bounded(value + part if head == "add" else value * part)  # type: ignore[operator]
        return value
    if head == "pow":
        base, exponent = exact(rest[0]), exact(rest[1])
        return None if base is None or exponent is None else _exact_power(base, exponent)
    if head == "fn":
        return _exact_function(rest[0], [exact(part) for part in rest[1:]])
    return None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > EXACT_BITS:
        raise TooLargeError
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator == 1:
        if base == 0 and exponent <= 0:
            return None
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1) and bits * abs(exponent) > EXACT_BITS:
            raise TooLargeError
        return base ** (int(exponent) if base not in (1, -1) else int(exponent) % 2)
    root = exponent.denominator
    if root > 64 or base < 0:
        return None
    parts = [_root(n, root) for n in (base.numerator, base.denominator)]
    if None in parts:
        return None
    return _exact_power(Fraction(*parts), Fraction(exponent.numerator))  # type: ignore[arg-type]


def _root(number: int, degree: int) -> int | None:
    """Its integer root, if it has one."""
    guess = math.isqrt(number) if degree == 2 else round(math.exp(math.log(number or 1) / degree))
    near = [n for n in (guess - 1, guess, guess + 1) if n >= 0 and n**degree == number]
    return near[0] if near else None


def _exact_function(name: str, values: list[Fraction | None]) -> Fraction | None:
    if None in values:
        return None
    numbers: list[Fraction] = values  # type: ignore[assignment]
    if name in _ROUNDING:
        return Fraction(_ROUNDING[name](numbers[0]))
    if name == "abs":
        return abs(numbers[0])
    whole = [int(number) for number in numbers if number.denominator == 1 and number >= 0]
    if len(whole) != len(numbers):
        return None
    if name == "factorial" or name == "binom":
        if whole[0] > 1000:
            raise TooLargeError
        return Fraction(math.factorial(whole[0]) if name == "factorial" else math.comb(*whole))
    return None


_ROUNDING = {"floor": math.floor, "ceil": math.ceil}

# -- at many digits ---------------------------------------------------------------------------


def nodes(node: Node) -> Iterator[Node]:
    """A formula and all that it consists of."""
    yield node
    for part in node[1:]:
        if isinstance(part, tuple) and part:
            yield from nodes(part)


def equal(first: Node, second: Node) -> bool | None:
    r"""Whether two formulas have one value; None if the first has none that can be computed.

    `\log` without a base has base 10 or e, the same on both sides.

    >>> x = ("sym", "x")
    >>> square = ("pow", ("add", x, ("num", 1, 1)), ("num", 2, 1))
    >>> equal(square, ("add", ("pow", x, ("num", 2, 1)), ("mul", ("num", 2, 1), x), ("num", 1, 1)))
    True
    """
    if first == second:
        return True
    try:
        values = exact(first), exact(second)
    except TooLargeError:
        return False
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    everything = [*nodes(first), *nodes(second)]
    bare_log = any(node[:2] == ("fn", "log") and len(node) == 3 for node in everything)
    bases = ("ten", "e") if bare_log else ("e",)
    verdicts = [_agree(first, second, everything, base) for base in bases]
    return None if None in verdicts and True not in verdicts else True in verdicts


def _agree(first: Node, second: Node, everything: list[Node], base: str) -> bool | None:
    names = sorted({node[1] for node in everything if node[0] == "sym"})
    whole = any(node[:2] in _WHOLE for node in everything) or any(
        node[0] == "pow" and node[1] in (("num", -1, 1), ("mul", ("num", -1, 1), ("num", 1, 1)))
        for node in everything
    )
    complex_said = any(node[0] == "i" for node in everything)
    left_out = compared = 0
    for number in range((8 if whole else 6) if names else 1):
        point = {name: _coordinate(name, number, whole) for name in names}
        try:
            one = _Evaluation(point, base).value(first)
        except UndefinedError:
            continue
        except TooLargeError:
            return None
        try:
            other = _Evaluation(point, base).value(second)
        except (UndefinedError, TooLargeError):
            return False
        same = _close(first, second, one, other, point, base)
        if same or complex_said or not (_is_complex(one) or _is_complex(other)):
            if not same:
                return False
            compared += 1
        else:
            left_out += 1
    if compared:
        return True
    return False if left_out else None


_WHOLE = {("fn", "floor"), ("fn", "ceil"), ("fn", "factorial"), ("fn", "binom")}


def _coordinate(name: str, number: int, whole: bool) -> Fraction:
    """What a variable is at a point: of three, all are positive, and then of any sign."""
    rng = random.Random(f"{name} {number}")
    if whole and name[0] not in "xyztuvw":
        return Fraction(rng.randint(2, 40))
    size = Fraction(rng.randint(1, 10**9), 10**9) + (number % 3 != 2) * rng.randint(0, 3)
    return size if number < 3 or rng.random() < 0.5 else -size


def _is_complex(value: Any) -> bool:
    return bool(value.imag != 0) and abs(value.imag) > abs(value) * 10.0**-AGREE


def _close(
    first: Node, second: Node, one: Any, other: Any, point: dict[str, Fraction], base: str
) -> bool:
    """Relatively; a value that is all rounding shrinks as digits are added, and is 0."""
    bound = _context(DIGITS).mpf(10) ** -AGREE
    if mpmath.isinf(one) or mpmath.isinf(other):
        return bool(one == other)
    if mpmath.isnan(one) or mpmath.isnan(other):
        return False
    large = max(abs(one), abs(other))
    if abs(one - other) <= bound * large:
        return True
    if large > bound:
        return False
    again = [
        _Evaluation(point, base, 3 * DIGITS).value(node) if value else value
        for node, value in ((first, one), (second, other))
    ]
    left = [
        value if abs(value) > bound * abs(before) else mpmath.mpf(0)
        for value, before in zip(again, (one, other), strict=True)
    ]
    return bool(abs(left[0] - left[1]) <= bound * max(map(abs, left)))


@functools.cache
def _context(digits: int) -> Any:
    context = mpmath.mp.clone()
    context.dps = digits
    return context


class _Evaluation:
    """Values at one point.

    Args:
      point: of the variables.
      base: of logarithms without one, "ten" or "e".
      digits: computed.
    """

    def __init__(self, point: dict[str, Fraction], base: str, digits: int = DIGITS):
        self.mp = _context(digits)
        self.point, self.base = point, base

    def value(self, node: Node) -> Any:
        """Of a formula.

        Raises:
          UndefinedError, TooLargeError: it has none, or none that can be computed.
        """
        try:
            return self._value(node)
        except (ArithmeticError, TypeError, ValueError) as error:  # mpmath's, of poles and domains
            raise UndefinedError(str(error)) from None

    def _value(self, node: Node) -> Any:
        head, *rest = node
        mp = self.mp
        if head == "num":
            return mp.mpf(rest[0]) / rest[1]
        if head == "sym":
            value = self.point[rest[0]]
            return mp.mpf(value.numerator) / value.denominator
        if head in ("pi", "e", "i", "inf"):
            return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1), "inf": mp.inf}[head]
        if head == "deg":
            return self._value(rest[0]) * mp.pi / 180
        if head == "pow":
            return self._power(self._value(rest[0]), rest[1])
        if head in ("fn", "app"):
            values = [self._value(part) for part in rest[1:]]
            return (self._function if head == "fn" else self._unknown)(rest[0], values)
        if head not in ("add", "mul"):
            raise UndefinedError(f"{head} is no number")
        values = [self._value(part) for part in rest]
        if head == "add":
            return mp.fsum(values)
        product = mp.mpf(1)
        for value in values:
            product *= value
        return product

    def _power(self, base: Any, node: Node) -> Any:
        mp = self.mp
        exponent = self._value(node)
        if base == 0:
            if mp.re(exponent) > 0:
                return mp.mpf(0)
            raise UndefinedError("a power of 0")
        if mp.isinf(base) or mp.isinf(exponent):
            return base**exponent
        if abs(exponent) * (abs(mp.log(abs(base))) + 1) > MAX_LOG:
            raise TooLargeError
        if not _is_complex(base) and mp.re(base) < 0:
            ratio = exact(node)
            if ratio is not None and ratio.denominator % 2 and ratio.denominator > 1:
                # The real root: of -8 the third is -2.
                size = (-mp.re(base)) ** exponent
                return -size if ratio.numerator % 2 else size
        return base**exponent

    def _function(self, name: str, values: list[Any]) -> Any:
        mp = self.mp
        first = values[0]
        if name == "abs":
            return abs(first)
        if name in ("log", "ln", "lg"):
            if name == "lg" or (name == "log" and self.base == "ten" and len(values) == 1):
                values = [first, mp.mpf(10)]
            if any(value == 0 for value in values):
                raise UndefinedError("a logarithm of 0")
            return mp.log(first) / mp.log(values[1]) if len(values) > 1 else mp.log(first)
        if abs(first) > MAX_ARGUMENT:
            raise TooLargeError
        if name in _ROUNDING:
            near = mp.nint(first)
            if abs(first - near) < mp.mpf(10) ** (-self.mp.dps // 2):
                return near
            return mp.floor(first) if name == "floor" else mp.ceil(first)
        if name in ("factorial", "binom"):
            if abs(first) > 1e6:
                raise TooLargeError
            return mp.factorial(first) if name == "factorial" else mp.binomial(*values)
        if name == "exp":
            return mp.exp(first)
        return getattr(mp, _MPMATH.get(name, name))(first)

    def _unknown(self, name: str, values: list[Any]) -> Any:
        """A smooth function of no special form, drawn from the name."""
        rng = random.Random(f"function {name}")
        inside = sum(rng.randint(1, 99) * value / 97 for value in values)
        if abs(inside) > MAX_ARGUMENT:
            raise TooLargeError
        return self.mp.sin(inside + rng.randint(1, 99)) + self.mp.mpf(rng.randint(200, 400)) / 100


_MPMATH = {
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{f"ar{name}": f"a{name}" for name in ("sinh", "cosh", "tanh")},
    **{f"arc{name}": f"a{name}" for name in ("sinh", "cosh", "tanh")},
}


# -- for worker processes ---------------------------------------------------------------------


def _tuples(node: Any) -> Any:
    return tuple(_tuples(part) for part in node) if isinstance(node, list) else node


def judge(pairs: str) -> list[bool | None]:
    """`equal` of each of several pairs of formulas, as JSON."""
    return [equal(first, second) for first, second in _tuples(json.loads(pairs))]
