r"""What a released field holds, as the bare problem or the bare answer."""

from __future__ import annotations

import math
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
    """A text or a number as text, without space around it.

    Raises:
      ValueError: nothing is left; or it is a list, a truth value, NaN or the like, whose text no
        answer would equal.

    >>> text(" 1/2 "), text(0.5)
    ('1/2', '0.5')
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected a text or a number, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
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


_THOUSANDS = re.compile(r"\$?-?[1-9][0-9]{0,2}(?:,[0-9]{3})+\$?")


def counted(answer: str, several: bool) -> str:
    """An answer with its commas as the set says what they are: of a list, or of a number.

    >>> counted("45,135", True), counted("45,135", False), counted("(1,2),(3,4)", True)
    ('45, 135', '45{,}135', '(1,2), (3,4)')
    """
    if not several:
        return answer.replace(",", "{,}") if _THOUSANDS.fullmatch(answer) else answer
    depth, pieces = 0, []
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        pieces.append(", " if character == "," and depth == 0 else character)
    return re.sub(r",\s+", ", ", "".join(pieces)) if depth == 0 else answer


# Between digits a space or a sign parts or joins numbers: "1.5" is not "15".
_DROPPED = re.compile(
    r"\\[,;:!~ ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-z])"
    r"|(?<![0-9])[\s.,:]+|[\s.,:]+(?![0-9.,:\s])|(?<![0-9A-Za-z)])!|[$~;?'\"`{}\\]+"
)


def same_problem(text: str) -> str:
    r"""A key that is equal for two texts of one problem.

    Case, spaces, punctuation, dollars, braces and backslashes are left out, but for what stands
    between digits and for factorials, and characters are brought to one form (NFKC). A problem told
    in other words has another key.

    >>> same_problem(r"Find $x$ if $2x = \frac{1}{2}$.") == same_problem("find x, if 2x=\\frac12")
    True
    >>> same_problem("1.5 + 2") == same_problem("15 + 2")
    False
    """
    return _DROPPED.sub("", unicodedata.normalize("NFKC", text).casefold())
