r"""What a released field holds, as the bare problem or the bare answer."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from occ.tasks.math_answers import extract_boxed

# DAPO's prompt, around every problem of its training set. What a model is to be asked is the
# task's to say (`mathematics.PROMPTS` has this one too), so that sets can be compared and mixed.
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.0*)?")


def without_dapo_template(text: str) -> str:
    """The problem in one of DAPO's prompts; a text without its template stays as it is.

    >>> without_dapo_template(DAPO_BEFORE + "What is 1 + 1?" + DAPO_AFTER)
    'What is 1 + 1?'
    """
    return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()


def text(value: Any) -> str:
    """The value as text, without space around it.

    Raises:
      ValueError: nothing is left.
    """
    found = str(value).strip()
    if not found:
        raise ValueError("expected a text, got an empty one")
    return found


def number(value: Any) -> str:
    """A whole number without leading zeros and decimals; any other answer as it is.

    >>> number("033"), number(27.0), number("-4"), number("1/2")
    ('33', '27', '-4', '1/2')
    """
    found = text(value)
    return str(int(float(found))) if _NUMBER.fullmatch(found) and len(found) < 16 else found


def boxed(value: Any) -> str:
    r"""What the last box of a solution holds.

    Raises:
      ValueError: it has none.

    >>> boxed(r"So $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    found = extract_boxed(text(value))
    if found is None or not found.strip():
        raise ValueError(rf"expected a solution with \boxed{{answer}}, got {str(value)[-80:]!r}")
    return found.strip()


def only(value: Any) -> str:
    """The one entry of a list, without dollars around it.

    Raises:
      ValueError: it is no list of one.

    >>> only(["$2,3$"])
    '2,3'
    """
    if not isinstance(value, list) or len(value) != 1:
        raise ValueError(f"expected a list of one answer, got {value!r}")
    found = text(value[0])
    inside = found.removeprefix("$").removesuffix("$").strip()
    return inside if inside and "$" not in inside else found


_DROPPED = re.compile(
    r"\\[,;:!~ ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|[\s$~.,;:!?'\"`{}\\]+"
)


def same_problem(text: str) -> str:
    r"""A key that is equal for two texts of one problem.

    Case, spaces, punctuation, dollars, braces and backslashes are left out, and characters are
    brought to one form (NFKC). A problem told in other words has another key.

    >>> same_problem(r"Find $x$ if $2x = \frac{1}{2}$.") == same_problem("find x, if 2x=\\frac12")
    True
    """
    return _DROPPED.sub("", unicodedata.normalize("NFKC", text).casefold())
