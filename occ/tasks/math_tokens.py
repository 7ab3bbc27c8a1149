r"""The text of an answer as tokens: typography, Markdown, delimiters and spellings brought to one.

No value is changed here: a space between digits, an `e` in a number, the case of a letter and a
comma are kept for `math_reading` unless they have one meaning alone (`tokens` says which).
Everything is linear in the length of the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from occ.tasks import math_units
from occ.tasks.math_typography import LETTERS, VARIANTS
from occ.tasks.math_units import names

MAX_CHARACTERS = 512  # of an answer; competition answers have fewer than 200
MAX_DIGITS = 400  # of one number
MAX_EXPONENT = 999  # of e-notation


class UnreadableError(ValueError):
    """A text that is no mathematics; the message says why."""


class Token(NamedTuple):
    r"""A piece of an answer.

    Attributes:
      kind: "num" (text of digits), "let" (one letter, Greek ones by name), "word", "fn" (a
        function's name), "cmd" (another LaTeX command, without its backslash) or "op".
      text: of the piece.
      spaced: whether a space stands before it.
      roman: whether it stood in `\text{...}` or the like.
    """

    kind: str
    text: str
    spaced: bool = False
    roman: bool = False


# -- tokens -----------------------------------------------------------------------------------

FUNCTIONS = frozenset(
    names(
        "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh "
        "coth sech csch arcsinh arccosh arctanh arsinh arcosh artanh ln log lg exp"
    )
)
SPELT = {
    **{"tg": "tan", "ctg": "cot", "cotg": "cot", "cosec": "csc", "arctg": "arctan"},
    **{f"a{name}": f"arc{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
}
# Letters together that are a word or a name even in a formula.
_PLAIN_WORDS = frozenset(names("and or to per sq cu am pm mod"))
SHORT_WORDS = frozenset(
    names("yes no odd red one two six ten all max min day way set even none true false zero")
)
_STYLES = names(
    "text textrm textbf textit texttt textnormal mathrm mathbf mathit mathsf mathtt mbox hbox "
    "rm bf it operatorname boldsymbol bm emph textsf mathnormal pmb"
)
_ROMAN = frozenset(
    names("text textrm textbf textit texttt textnormal mathrm mbox hbox operatorname emph")
)
_IGNORED = frozenset(
    names(
        "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
        "textstyle scriptstyle limits nolimits mathstrut boxed fbox framebox rm bf it cal middle "
        "mathopen mathclose mathord"
    )
)
_COMMANDS = {
    **{"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom"},
    **{
        "le": "leq",
        "leqslant": "leq",
        "leqq": "leq",
        "ge": "geq",
        "geqslant": "geq",
        "geqq": "geq",
    },
    **{"ne": "neq", "not=": "neq", "lbrace": "{", "rbrace": "}", "lvert": "|", "rvert": "|"},
    **{"vert": "|", "mid": "|", "lt": "<", "gt": ">", "degree": "circ", "varnothing": "emptyset"},
    **{
        "div": "/",
        "cdotp": "cdot",
        "ast": "cdot",
        "bullet": "cdot",
        "simeq": "approx",
        "sim": "approx",
    },
    **{"doteq": "approx", "colon": ":", "lbrack": "[", "rbrack": "]", "euro": "€", "pounds": "£"},
    **{
        "smallsetminus": "setminus",
        "backslash": "setminus",
        "bigcup": "cup",
        "overrightarrow": "vec",
    },
    **{
        "dots": "ldots",
        "cdots": "ldots",
        "imath": "i",
        "textdollar": "$",
        "texteuro": "€",
        "notin": "notin",
    },
    **{"infin": "infty", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "prime": "'"},
}
_OPERATORS = frozenset(names("{ } | < > / [ ] : € £ $ '"))

_SPACE = r"(?:[ ~]|\\[,;:> ]|\\(?:quad|qquad|enspace|thinspace)(?![A-Za-z]))"
_GROUP_SPACE = r"(?:[ ~]|\\[,;: ])"
_MASTER = re.compile(
    rf"(?P<space>{_SPACE}+)"
    r"|(?P<glue>\\!\s*)"
    rf"|(?P<grouped>[1-9]\d{{0,2}}(?:(?:(?:\{{,\}}|,\\!\s*)\d{{3}})+|(?:{_GROUP_SPACE}\d{{3}})+)(?:\.\d+)?"
    rf"(?!\d|{_GROUP_SPACE}?\d|\s*/|\{{,\}}))"
    r"|(?P<num>\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<style>\\(?:" + "|".join(sorted(_STYLES, key=len, reverse=True)) + r")\*?\s*\{)"
    r"|\\(?P<cmd>[A-Za-z]+)"
    r"|\\(?P<escaped>[^A-Za-z])"
    r"|(?P<dotted>(?:np|math|numpy|sympy)\.)"
    r"|(?P<run>[A-Za-z]+)"
    r"|(?P<cjk>[\u4e00-\u9fff]+)"
    r"|(?P<other>.)",
    re.DOTALL | re.ASCII,
)
_EXPONENT = re.compile(
    # Right after a number: of digits alone, or with a sign where the number ends there.
    r"\s?[eE](?P<plain>\d{1,9})(?![\d.])"
    r"|[eE](?P<signed>[+-]\d{1,9})"
    r"(?=\s*(?:$|[,;)\]}%$]|\\\}|\\(?:text|mathrm|[,;:! %)\]]|right|times|cdot))"
    r"|\s+(?:" + "|".join(sorted(math_units.PLAIN, key=len, reverse=True)) + r"|[mgsJNVWK])\b)"
)
_ROMAN_E = re.compile(
    r"(?<=[\d.])(?:\s|\\,)*\\(?:mathrm|text|textrm|rm)\s*\{\s*([eE])\s*"
    r"(?:\}\s*\{?([+-]?\d+)\}?|([+-]?\d+)\s*\})"
)
_REPEATING = re.compile(
    r"\\(?:overline|bar)\s*\{(\d{1,30})\}|\\dot\{?(\d)\}?(?:(\d{0,30})\\dot\{?(\d)\}?)?"
)
_BEFORE_NUMBER = frozenset(names("( [ { \\{ , ; = approx pm and or < > leq geq in : $ € £"))


def tokens(text: str) -> list[Token]:
    r"""Tokens of an answer, without `$`, `\left`, `\displaystyle` and the like.

    Digits with `{,}`, `,\!` or one space between every three are one number; digits with a point
    and `e14` too. Letters are single but for functions, units and words.

    Args:
      text: of at most `MAX_CHARACTERS`, after `typography`.

    Raises:
      UnreadableError: with the reason.

    >>> [token.text for token in tokens(r"22,\! 333,\! 444 \dfrac 12 6e3")]
    ['22333444', 'frac', '12', '6e3']
    """
    scanner = _Scanner()
    scanner.scan(_ROMAN_E.sub(r"\1\2\3", text), roman=False, depth=0)
    return scanner.found


class _Scanner:
    """Tokens found so far."""

    def __init__(self) -> None:
        self.found: list[Token] = []
        self.spaced = self.as_text = False

    def put(self, kind: str, text: str, roman: bool = False) -> None:
        """Adds a token."""
        self.found.append(Token(kind, text, self.spaced, roman))
        self.spaced = False

    def scan(self, text: str, *, roman: bool, depth: int) -> None:
        """Adds the tokens of a text."""
        if depth > 8:
            raise UnreadableError("styles more than 8 deep")
        place = 0
        while place < len(text):
            match = _MASTER.match(text, place)
            assert match is not None  # its last alternative is any character
            kind, value = str(match.lastgroup), match.group(match.lastgroup or 0)
            place = match.end()
            if kind == "space":
                self.spaced = True
            elif kind in ("grouped", "num"):
                place = self.number(re.sub(r"[^0-9.]", "", value), text, place)
            elif kind == "style":
                place = self.styled(match, text, depth)
            elif kind == "cmd":
                self.command(value)
            elif kind == "escaped":
                self.escaped(value)
            elif kind == "run":
                self.letters(value, roman)
            elif kind == "cjk":
                self.put("word", value, True)
            elif kind == "other" and value != "$":
                if value not in "{}()[]|!^_,;:+-*/=<>%.&'\"@€£¥¢":
                    raise UnreadableError(f"the character {value!r}")
                if value == "*" and text[place : place + 1] == "*":
                    value, place = "^", place + 1
                self.put("op", value)

    def number(self, digits: str, text: str, place: int) -> int:
        """Digits with what belongs to them: repeating ones as "(3)", and an exponent as "e5"."""
        if len(digits) > MAX_DIGITS:
            raise UnreadableError(f"a number of more than {MAX_DIGITS} digits")
        again = _REPEATING.match(text, place) if "." in digits else None
        exponent = _EXPONENT.match(text, place)
        if again:
            whole, first, middle, last = again.groups()
            digits += f"({whole if whole else first + (middle + last if last else '')})"
            place = again.end()
        elif exponent and not (exponent["signed"] and self.inside_sum()):
            power = int(exponent["plain"] or exponent["signed"])
            if abs(power) > MAX_EXPONENT:
                raise UnreadableError("an exponent of more than three digits")
            digits, place = f"{digits}e{power}", exponent.end()
        self.put("num", digits)
        return place

    def inside_sum(self) -> bool:
        """Whether a number that follows is joined to something, as in "7-2e-3"."""
        before = [token.text for token in self.found[-2:]]
        if before and before[-1] in ("+", "-"):
            before.pop()
        return bool(before) and before[-1] not in _BEFORE_NUMBER

    def styled(self, match: re.Match[str], text: str, depth: int) -> int:
        r"""What stands in `\text{...}` or `\mathbf{...}`; returns where it ends."""
        end, level = match.end(), 1
        while end < len(text) and level:
            level += (text[end] == "{") - (text[end] == "}")
            end += 1
        if level:
            raise UnreadableError("unbalanced braces")
        inside = text[match.end() : end - 1]
        # A bold number or formula is what it would be without.
        roman = match["style"].strip("\\{* ") in _ROMAN and not re.fullmatch(r"[\d.\s]+", inside)
        outside, self.as_text = self.as_text, "text" in match["style"] or "box" in match["style"]
        self.scan(inside.replace(r"\&", " and "), roman=roman, depth=depth + 1)
        self.as_text = outside
        return end

    def escaped(self, value: str) -> None:
        """Adds an escaped character."""
        if value in "{}|":
            self.put("op", "\\" + value)
        elif value in "%$&#_":
            self.put("op", value)
        elif value == "\\":
            self.put("op", "\\\\")
        elif value not in "()[]!,;:> /":
            raise UnreadableError(f"the command \\{value}")

    def command(self, name: str) -> None:
        """Adds a command, by its common name."""
        name = VARIANTS.get(name, name)
        name = SPELT.get(name, _COMMANDS.get(name, name))
        if name in _IGNORED:
            return
        if name in ("{", "}"):
            self.put("op", "\\" + name)
        elif name in _OPERATORS:
            self.put("op", name)
        elif name in ("and", "or"):
            self.put("word", name)
        elif name in FUNCTIONS:
            self.put("fn", name)
        else:
            self.put("let" if name in LETTERS or name == "i" else "cmd", name)

    def letters(self, run: str, roman: bool) -> None:
        """Letters that stand together."""
        before = self.found[-1] if self.found else None
        number_before = before is not None and (
            before.kind == "num"
            or (roman and before.text in ("}", ")") and (self.spaced or self.as_text))
        )
        name, lower = SPELT.get(run, run), run.lower()
        if name in FUNCTIONS:
            self.put("fn", name)
        elif run == "pi":
            self.put("let", "pi")
        elif run in ("sqrt", "infinity", "inf", "infty"):
            self.put("cmd", "sqrt" if run == "sqrt" else "infty")
        elif len(run) == 1:
            # Roman letters of formulas; others are units beside a number, and names elsewhere.
            unit = roman and number_before and run in math_units.LETTERS
            self.put("word" if unit else "let", run, roman)
        elif (
            roman
            or lower in _PLAIN_WORDS
            or lower in SHORT_WORDS
            or (number_before and (run in math_units.PLAIN or lower in math_units.PLAIN))
            or (len(run) > 3 and re.search("[aeiouy]", lower))
        ):
            self.put("word", run, roman)
        else:
            for letter in run:
                self.put("let", letter)
