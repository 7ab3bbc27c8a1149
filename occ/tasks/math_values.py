"""Answers that are numbers, words, or lists of them, compared exactly and without algebra.

An answer becomes at most a `Fraction` of bounded length; nothing is evaluated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from fractions import Fraction

from occ.tasks.math_answers import MAX_DIGITS, TOKEN

MAX_PARTS = 12  # of a set that is compared part by part, each with each

# -- numbers ----------------------------------------------------------------------------------

_INTEGER = rf"[0-9]{{1,{MAX_DIGITS}}}"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]{{0,{MAX_DIGITS}}})?|\.[0-9]{{1,{MAX_DIGITS}}})"
_REPEATING = r"(?:\\overline\{(?P<repeat>[0-9]{1,20})\})?"
_SCIENTIFIC = r"(?:(?:\\times|\\cdot)10\^\{(?P<power>-?[0-9]{1,2})\})?"
_QUANTITY = re.compile(
    r"(?P<currency>\\\$)?(?P<sign>[+-]?)(?P<currency_after_sign>\\\$)?(?:"
    rf"(?P<whole>{_INTEGER})?"
    rf"\\frac\{{(?P<minus>-?)(?P<over>{_INTEGER})\}}\{{(?P<under>{_INTEGER})\}}"
    rf"|(?P<numerator>{_INTEGER})/(?P<denominator>{_INTEGER})"
    rf"|(?P<decimal>{_DECIMAL}){_REPEATING}{_SCIENTIFIC}"
    r")(?:_\{(?P<base>[0-9]{1,2})\})?(?P<unit>.*)",
    re.DOTALL,
)
_UNIT = re.compile(
    r"(?P<percent>\\?%)|(?P<degree>\^\\circ)"
    r"|\\text\{(?P<name>[A-Za-z./]+)(?:\^\{(?P<inner>[23])\}\}|\}(?:\^\{(?P<outer>[23])\})?)"
    r"|(?P<plain>[a-z]{2,})(?:\^\{(?P<plain_power>[23])\})?"
)
_UNITS = {
    "centimeter": "cm",
    "centimetre": "cm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "kilometre": "km",
    "millimeter": "mm",
    "millimetre": "mm",
    "inche": "in",  # "inches" without its s
    "inch": "in",
    "foot": "ft",
    "feet": "ft",
    "mile": "mi",
    "hour": "h",
    "hr": "h",
    "minute": "min",
    "second": "s",
    "sec": "s",
    "gram": "g",
    "kilogram": "kg",
    "liter": "l",
    "litre": "l",
    "percent": "%",
    "squareunit": "unit^2",
    "cubicunit": "unit^3",
    "squarecm": "cm^2",
    "cubiccm": "cm^3",
    "squarefeet": "ft^2",
    "squarefoot": "ft^2",
    "squareinch": "in^2",
    "squareinche": "in^2",
    "squaremeter": "m^2",
}
# Units that are known as such without being marked as text.
_PLAIN = {*_UNITS, *_UNITS.values(), "cent", "degree", "dollar", "mph", "unit", "year"}


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number with what was written beside it.

    Attributes:
      value: the number, without its percent sign.
      unit: canonical; "%" and "base 2" are units too; empty without one.
    """

    value: Fraction
    unit: str = ""


def quantity(text: str) -> Quantity | None:
    r"""The number that an answer is, exactly, or None for anything else.

    Args:
      text: normalised.

    >>> quantity(r"-1\frac{1}{2}"), quantity(r"3.50\text{cm}^{2}")
    (Quantity(value=Fraction(-3, 2), unit=''), Quantity(value=Fraction(7, 2), unit='cm^2'))
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    under = match["under"] or match["denominator"] or "1"
    if int(under) == 0 or (match["whole"] and match["minus"]):
        return None
    if match["decimal"]:
        value = _decimal(match["decimal"], match["repeat"])
        value *= Fraction(10) ** int(match["power"] or 0)
    else:
        value = Fraction(int(match["over"] or match["numerator"]), int(under))
        value = int(match["whole"] or 0) + (-value if match["minus"] else value)
    unit = _unit(match["unit"])
    if unit is None or (unit and match["base"]):
        return None
    if match["currency"] or match["currency_after_sign"]:
        unit = unit or "dollar"
    return Quantity(
        -value if match["sign"] == "-" else value,
        f"base {match['base']}" if match["base"] else unit,
    )


_TRAILING_UNIT = re.compile(
    r"(?<=.)(\^\\circ|\\text\{[A-Za-z./]+(?:\^\{[23]\}\}|\}(?:\^\{[23]\})?))\Z"
)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def split_unit(text: str) -> tuple[str, str]:
    r"""An expression and the unit after it, which may be empty.

    >>> split_unit(r"2\sqrt{3}\text{cm}"), split_unit(r"\sin 30^\circ")
    (('2\\sqrt{3}', 'cm'), ('\\sin 30^\\circ', ''))
    """
    match = _TRAILING_UNIT.search(text)
    if match is None or (match[1] == r"^\circ" and _ANGLE_FUNCTION.search(text)):
        return text, ""
    return text[: match.start()], _unit(match[1]) or ""


def _decimal(digits: str, repeat: str | None) -> Fraction:
    whole, _, places = digits.partition(".")
    value = Fraction(int(whole + places or "0"), 10 ** len(places))
    if repeat is None:
        return value
    return value + Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(places))


def _unit(text: str) -> str | None:
    if not text:
        return ""
    match = _UNIT.fullmatch(text)
    if match is None:
        return None
    if match["percent"] or match["degree"]:
        return "%" if match["percent"] else "degree"
    name = (match["name"] or match["plain"]).lower().rstrip(".")
    name = name[:-1] if len(name) > 2 and name.endswith("s") else name
    if match["plain"] and name not in _PLAIN:
        return None  # "2xy" is a product
    power = match["inner"] or match["outer"] or match["plain_power"]
    return _UNITS.get(name, name) + (f"^{power}" if power else "")


def same_quantity(reference: Quantity, answer: Quantity) -> bool:
    """Whether two numbers are the same, exactly; either may leave its unit out.

    A percentage also equals the fraction that it is: 50 % is 50, the sign left out, and 0.5.
    """
    if reference.unit and answer.unit and reference.unit != answer.unit:
        return False
    if reference.value == answer.value:
        return True
    units = (reference.unit, answer.unit)
    if units == ("%", ""):
        return reference.value / 100 == answer.value
    return units == ("", "%") and reference.value == answer.value / 100


# -- lists ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Listing:
    """Several parts in one pair of brackets.

    Attributes:
      brackets: "()", "[)" and so on in order; "{}", or none, without order.
      parts: between the commas.
    """

    brackets: str
    parts: tuple[str, ...]


def listing(text: str) -> Listing | None:
    r"""The parts of a tuple, interval, set or bare list, or None for anything else.

    >>> listing(r"\{1,(2,3)\}")
    Listing(brackets='{}', parts=('1', '(2,3)'))
    >>> listing("[0,1)"), listing("(1,2)+(3,4)")
    (Listing(brackets='[)', parts=('0', '1')), None)
    """
    tokens = TOKEN.findall(text)
    brackets = tokens[0] + tokens[-1] if len(tokens) > 2 and _encloses(tokens) else ""
    depth, parts = 0, [""]
    for token in tokens[1:-1] if brackets else tokens:
        depth += (token in _OPENING) - (token in _CLOSING)
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    if not all(parts) or (len(parts) == 1 and brackets != r"\{\}"):
        return None
    return Listing(brackets.replace("\\", ""), tuple(parts))


_OPENING = ("(", "[", "{", r"\{")
_CLOSING = (")", "]", "}", r"\}")


def _encloses(tokens: list[str]) -> bool:
    """Whether the first token is a bracket that the last one closes."""
    pairs = {"(": (")", "]"), "[": (")", "]"), r"\{": (r"\}",)}
    if tokens[-1] not in pairs.get(tokens[0], ()):
        return False
    depth = 0
    for token in tokens[:-1]:
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth <= 0:
            return False
    return depth == 1


# -- the cheap verdict ------------------------------------------------------------------------

_NAMED = re.compile(r"([A-Za-z])(?:=|\\in)(?=.)")
_TEXT = re.compile(r"\\text\{([^{}\\]*)\}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")


def compare(reference: str, answer: str) -> bool | None:
    r"""Whether two answers are equal as far as that takes no algebra; None where it does.

    Exact: a rounded decimal is not the fraction that it approximates.

    Args:
      reference, answer: normalised.

    >>> compare("0.5", r"\frac{1}{2}"), compare("1,2", r"\{2,1\}"), compare("[1,2]", "(1,2]")
    (True, True, False)
    >>> compare("x+1", "1+x") is None
    True
    """
    reference, answer = _unnamed(reference, answer)
    if reference == answer:
        return True
    words = _words(reference)
    if words is not None:
        found_words = _words(answer)
        if found_words is not None or reference.startswith(r"\text"):
            return words == found_words
        return None  # a letter may be a variable
    expected, found = quantity(reference), quantity(answer)
    if expected is not None and found is not None:
        return same_quantity(expected, found)
    expected_list, found_list = listing(reference), listing(answer)
    if expected_list is not None and found_list is not None:
        return _same_listing(expected_list, found_list)
    for number, several in [(expected, found_list), (found, expected_list)]:
        if number is not None and several is not None and len(several.parts) > 1:
            return False
    return None


def is_value(text: str) -> bool:
    """Whether an answer is a number, words, or a list of such."""
    if quantity(text) is not None or _words(text) is not None:
        return True
    parts = listing(text)
    return parts is not None and all(is_value(part) for part in parts.parts)


def _unnamed(reference: str, answer: str) -> tuple[str, str]:
    r"""Without "x=" or "x\in" where only one of the two has it."""
    names = _NAMED.match(reference), _NAMED.match(answer)
    if names[0] and not names[1] and "=" not in answer:
        return reference[names[0].end() :], answer
    if names[1] and not names[0] and "=" not in reference:
        return reference, answer[names[1].end() :]
    return reference, answer


def _words(text: str) -> str | None:
    """An answer in words, or a choice among letters, in lower case; None for a formula."""
    match = _TEXT.fullmatch(text)
    inner = text if match is None else match.group(1)
    letter = _CHOICE.fullmatch(inner)
    if letter is not None:
        return letter.group(1).lower()
    if match is None and not (len(text) > 2 and text.isalpha()):
        return None
    return inner.replace(" ", "").lower()


def _same_listing(reference: Listing, answer: Listing) -> bool | None:
    ordered = reference.brackets not in ("", "{}")
    if ordered:
        if reference.brackets != answer.brackets or len(reference.parts) != len(answer.parts):
            return False
        pairs = zip(reference.parts, answer.parts, strict=True)
        return _all(compare(expected, found) for expected, found in pairs)
    if answer.brackets not in ("", "{}"):
        return False
    sides = [[quantity(part) for part in side.parts] for side in (reference, answer)]
    if None not in sides[0] and None not in sides[1]:
        values = [{number.value for number in side if number is not None} for side in sides]
        return values[0] == values[1]
    if max(len(reference.parts), len(answer.parts)) > MAX_PARTS:
        return None
    matches = [[compare(one, other) for other in answer.parts] for one in reference.parts]
    return _all(_any(row) for row in [*matches, *zip(*matches, strict=True)])


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """False if any is, else None if any is unknown."""
    seen = set(verdicts)
    return False if False in seen else None if None in seen else True


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    seen = set(verdicts)
    return True if True in seen else None if None in seen else False
