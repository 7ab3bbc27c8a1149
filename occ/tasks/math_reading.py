r"""From the text of an answer to the value that it denotes, or to the reason why it denotes none.

`read` gives a tree of tuples. Formulas are those of `math_numeric`; around them stand

  ("qty", a, unit)           a number with a unit of `math_units`
  ("tuple", "()", a, ...)    in order, also an interval
  ("set", a, ...)            ("list", (",", "or"), a, ...)
  ("rel", ("<", "="), a, b, c)          a chain of relations
  ("union", a, ...) ("diff", a, b)      of sets
  ("matrix", (a, ...), ...)  rows       ("ratio", a, ...)
  ("time", minutes, "am" or "pm" or "")  of day      ("base", digits, n)  a number in base n
  ("cong", a, n)  modulo n              ("words", text)       ("choice", letter, value or None)

A value is never changed by tidying. What is written down here, since it could be read otherwise:

- `3 2/5` and `3\frac{2}{5}` are 17/5; with an improper fraction, or other digits beside digits, a
  text denotes nothing. `2 000` is 2000: spaces join groups of three alone.
- `6e3` is 6000, and so is `6e-3` where the number begins and ends there; in `7-2e-3` and
  `7 - 2e - 3` the e is Euler's.
- `18,107` is one number or a list of two: both are tried. A space after a comma makes a list
  (`18, 107`), a group with leading zeros (`10,000`), `{,}` and `,\!` make a number.
- `a/bc` is (a/b)c. `\sqrt12` and `2^10` take all digits, `\frac12` one each.
- `f(x)`, `I(0)` and `u(t)` are functions of unknown form, `n(n+1)` is a product.
- `e` and `i` are the constants; `E`, `I` and letters with an index are variables. Case counts.
- A sign of approximation in front (`\approx 56`, `\sim 56`) is dropped: the number is judged, as
  exactly as any other. A word ("about 56") is not an answer.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from occ.tasks import math_units
from occ.tasks.math_nodes import number
from occ.tasks.math_parser import Parser
from occ.tasks.math_tokens import (
    MAX_CHARACTERS,
    SHORT_WORDS,
    UnreadableError,
    tokens,
)
from occ.tasks.math_typography import bare, typography

Node = Any

# A run of groups of three that commas join, unless they part a list.
_COMMAS = re.compile(r"(?<![\d.])(?<!\d,)(?<!\d, )[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d|\.\d*,)")
_STYLE = re.compile(
    r"\\(?:text(?:bf|rm|it)?|mathrm|mathbf|mbox|boldsymbol|operatorname)\s*\{([^{}]*)\}"
)
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\s+is\s+)?"
    r"(?:\(?(?:option|choice)\s+)?(?:\(\s*([A-J])\s*\)\s*[.:]?|([A-J])\s*[).](?=\s|\\|$|\d))(.*)",
    re.DOTALL | re.IGNORECASE,
)
_DERIVATIVE = re.compile(r"(?<![A-Za-z\\])d([A-Za-z])\s*/\s*d([A-Za-z])(?![A-Za-z(])")
_MERIDIEM = re.compile(r"(?<=[\d\s{~])([aApP])\.\s?[mM]\b\.?")
_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_COUNT = {name: value for value, name in enumerate(_UNITS)} | {
    name: 10 * value for value, name in enumerate(_TENS, 2)
}


@functools.lru_cache(maxsize=8192)
def read(text: str) -> tuple[Node, ...]:
    r"""What an answer denotes, in each of the readings that are open.

    Raises:
      UnreadableError: with the reason.

    >>> read(r"\frac{1}{2}"), read("18,107")[0]
    ((('num', 1, 2),), ('num', 18107, 1))
    >>> [len(read(text)) for text in ("18,107", "18, 107", "10,000")]
    [2, 1, 1]
    """
    return _read(text, False)


@functools.lru_cache(maxsize=8192)
def read_with_units(text: str) -> tuple[Node, ...]:
    """As `read`, where a letter after a number and a space is also a unit, as in "5 m"."""
    found = [*_read(text, False), *_read(text, True)]
    return tuple(dict.fromkeys([*found, *filter(None, map(_said_mixed, found))]))


def _said_mixed(value: Node) -> Node | None:
    """A mixed number from "5 and 2/9"."""
    if value[:2] != ("list", ("and",)) or not value[2][0] == value[3][0] == "num":
        return None
    (_, whole, one), (_, over, under) = value[2:]
    return (
        number(whole + Fraction(over, under)) if one == 1 and 0 < over < under and whole else None
    )


def _read(text: str, letters_are_units: bool) -> tuple[Node, ...]:
    if len(text) > MAX_CHARACTERS:
        raise UnreadableError(f"more than {MAX_CHARACTERS} characters")
    text = bare(typography(text.strip()))
    if not text:
        raise UnreadableError("nothing")
    choice = _choice(text)
    if choice is not None:
        return choice
    words = _words(_said_twice(text))
    if words is not None:
        return (words,)
    text = _MERIDIEM.sub(r"\1m", _DERIVATIVE.sub(r"\\frac{d\1}{d\2}", text))
    found: list[Node] = []
    problem: UnreadableError | None = None
    for variant in _thousands(text):
        try:
            value = Parser(tokens(variant), letters_are_units).whole()
        except UnreadableError as error:
            problem = problem or error
            continue
        if value not in found:
            found.append(value)
    if not found:
        raise problem or UnreadableError("nothing")
    return tuple(found)


def _thousands(text: str) -> list[str]:
    """The text with commas between groups of three as parts of numbers, and as between parts."""
    joined, parted = [], []
    place = depth = 0
    for match in _COMMAS.finditer(text):
        between = text[place : match.start()]
        depth += sum(map(between.count, "([")) - sum(map(between.count, ")]"))
        depth += between.count(r"\{") - between.count(r"\}")
        digits = match.group()
        whole, apart = digits.replace(",", ""), digits.replace(",", ", ")
        if ",0" in digits:
            apart = whole  # no part of a list begins with zeros
        elif depth > 0:
            whole = apart  # "(1,234)" is a pair
        joined += [between, whole]
        parted += [between, apart]
        place = match.end()
    variants = ["".join([*parts, text[place:]]) for parts in (joined, parted)]
    return list(dict.fromkeys(variants))


_OPTION = re.compile(r"\s*(?:option|choice)\s+\(?([A-J])\)?\s*", re.IGNORECASE)


def _choice(text: str) -> tuple[Node, ...] | None:
    r"""`\textbf{(B)}\ 17`, `(B)`, `B.`; a letter alone is a letter."""
    option = _OPTION.fullmatch(_STYLE.sub(r"\1", text))
    if option is not None:
        return (("choice", option[1], None),)
    match = _CHOICE.fullmatch(_STYLE.sub(r"\1", text))
    if match is None:
        return None
    letter, rest = match[1] or match[2], match[3]
    rest = re.sub(r"^(?:\\[,;:! ]|\\q?quad|[\s$~:])+", "", rest)
    if not rest.strip("$ "):
        return (("choice", letter, None),)
    if rest[0] in "+-*/^=_!(<>|&,;)" or rest.startswith((r"\cdot", r"\times", r"\cup")):
        return None
    return tuple(("choice", letter, value) for value in read(rest))


_PHRASE = re.compile(r"[A-Za-z][A-Za-z .,'&-]*")


def _words(text: str) -> Node | None:
    """An answer in words; None for a formula."""
    styled = _STYLE.sub(r" \1 ", text).replace("$", " ").replace(r"\ ", " ").strip()
    if _PHRASE.fullmatch(styled) is None:
        return None
    runs = re.findall("[A-Za-z]+", styled)
    marked = _STYLE.fullmatch(text.strip("$ ")) is not None
    wordy = [
        run.lower() in SHORT_WORDS or (len(run) > 3 and re.search("[aeiouy]", run.lower()))
        for run in runs
    ]
    if not any(wordy) and not (marked and any(len(run) > 1 for run in runs)):
        return None
    if re.search(r"[A-Za-z](?:\s*,\s*|\s+(?:and|or)\s+)[A-Za-z]\b(?![a-z])", styled):
        return None  # a list of letters
    for length in range(len(runs), 0, -1):
        value = _counted([run.lower() for run in runs[:length]])
        unit = math_units.phrase(list(runs[length:]))
        if value is not None and unit is not None:
            return ("qty", number(value), unit) if runs[length:] else number(value)
    joined = "".join(runs).lower()
    if {run.lower() for run in runs} & {"sin", "cos", "tan", "log", "exp", "sqrt", "arctan"}:
        return None
    return ("words", joined)


def _said_twice(text: str) -> str:
    """The words alone of "Sixty (60)", where both say the same."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z -]*?)\s*\(\$?(\d+)\$?\)", text)
    if match is None:
        return text
    value = _counted(re.findall("[a-z]+", match[1].lower()))
    return match[1] if value == int(match[2]) else text


def _counted(words: list[str]) -> int | None:
    """A number in words: "seven", "forty-two", "one million"."""
    multiple = math_units.MULTIPLES.get(words[-1], 0) if len(words) == 2 else 0
    if multiple:
        words = words[:1]
    values = [_COUNT.get(word, -1) for word in words]
    if -1 in values or len(values) > 2:
        return None
    if len(values) == 2 and not (values[0] >= 20 and 0 < values[1] < 10):
        return None
    return sum(values) * (multiple or 1)
