"""The answer in what a language model writes freely, such as "the sum of 12 and 30 is 42".

Nothing of it is evaluated, and everything is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from occ.tasks.math_answers import extract_answer_line

MAX_DIGITS = 60  # of a number
_NUMBER = re.compile(
    r"(?<![\w.,])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"  # after no digit, a minus is a sign
    r"|\d+(?:\.\d+)?"
)
_MINUS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})


def extract_number(text: str) -> str | None:
    r"""The last number of the last `Answer:` line, or of all of the text if there is no such line.

    The last, since what a model says in order to arrive at an answer comes before it; only one, so
    that a list of guesses gains nothing. Commas between thousands are left out.

    Returns:
      Digits, with a sign and a fraction if there is one; None without a number, or where it has
      more digits than any answer.

    >>> extract_number("12 + 30 = 42.")
    '42'
    >>> extract_number("Answer: 1,234\n(I added 2 numbers.)")
    '1234'
    >>> extract_number("5-3 is 2, and 3 - 5 = -2")
    '-2'
    >>> extract_number("I do not know.") is None
    True
    """
    line = extract_answer_line(text)
    found = _NUMBER.findall((text if line is None else line).translate(_MINUS))
    if not found or len(found[-1]) > MAX_DIGITS:
        return None
    return found[-1].replace(",", "")


def whole_text(text: str) -> str | None:
    """The text as it is, for models that write nothing but the answer."""
    return text


EXTRACTIONS: dict[str, Callable[[str], str | None]] = {
    "text": whole_text,
    "number": extract_number,
}
"""By name."""
