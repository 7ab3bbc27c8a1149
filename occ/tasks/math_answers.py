"""Final answers of mathematics, as text: found in a completion, normalised, and bounded.

Nothing of an answer is evaluated here, and everything is linear in the length of the text.
`occ.tasks.math_values` compares what can be compared without algebra; the rest goes to a worker
process (`occ.tasks.math_task`).
"""

from __future__ import annotations

import re

MAX_CHARACTERS = 512  # of an answer; competition answers have fewer than 200
MAX_DIGITS = 60  # of one number
MAX_DEPTH = 12  # of brackets
MAX_FUNCTIONS = 16  # roots, logarithms, sines

# -- where the answer is ----------------------------------------------------------------------

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(r"answer[ \t]*:([^\n]*)", re.IGNORECASE)


def extract_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` or `\fbox{...}` holds; None without one, or if it never closes.

    >>> extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}") is None
    True
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    box = _BOX.match(text, start) if start >= 0 else None
    if box is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # an escaped brace is a character
        if depth == 0:
            return text[box.end() : brace.start()]
    return None


def extract_answer_line(text: str) -> str | None:
    r"""What follows the last `Answer:`, to the end of its line (the form of DAPO's prompt).

    Reference: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    arXiv:2503.14476.

    >>> extract_answer_line("Answer: 7? Let me see.\n**Answer:** $12$\n")
    '$12$'
    >>> extract_answer_line("The answer is 12.") is None
    True
    """
    lines = _ANSWER_LINE.findall(text)
    return lines[-1].strip(" \t\r*") or None if lines else None


# -- one way to write it ----------------------------------------------------------------------

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+\Z")
_SIZES = r"\left|\right|\big|\Big|\bigg|\Bigg|\bigl|\bigr|\Bigl|\Bigr|\displaystyle|\textstyle"
_SPACES = r"\quad|\qquad|\!|\,|\;|\:|\ |~"
_DELIMITERS = r"$|\(|\)"
_DROPPED = frozenset("|".join((_SIZES, _SPACES, _DELIMITERS)).split("|"))
_RENAMED = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\mathrm": r"\text",
    r"\mbox": r"\text",
    r"\textbf": r"\text",
    r"\textrm": r"\text",
    r"\mathbf": r"\text",
    r"\operatorname": r"\text",
    r"\le": r"\leq",
    r"\ge": r"\geq",
    r"\ne": r"\neq",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\mid": "|",
    r"\degree": r"^\circ",
    r"\varnothing": r"\emptyset",
    r"\div": "/",
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times",
    "·": r"\cdot",
    "÷": "/",
    "π": r"\pi",
    "∞": r"\infty",
    "√": r"\sqrt",
    "°": r"^\circ",
    "≤": r"\leq",
    "≥": r"\geq",
    "≠": r"\neq",
    "\N{UNION}": r"\cup",
    "∩": r"\cap",
    "∈": r"\in",
    "∅": r"\emptyset",
    "²": "^2",
    "³": "^3",
}
_BARE_ARGUMENT = re.compile(r"(\\sqrt|_)([0-9A-Za-z])|(\^)(-?[0-9]+|[A-Za-z])")
_TWO_DIGITS = re.compile(r"\\frac([0-9])([0-9])")
_DIGIT_AND_GROUP = re.compile(r"\\frac([0-9])\{")
_CONJUNCTION = re.compile(r",?\\text\{,?(?:and|or)\}")
# Not after a bracket: "(1,234)" is a pair.
_THOUSANDS = re.compile(
    r"(?<![0-9,.{(\[])([1-9][0-9]{0,2})((?:(?:\{,\}|,(?:\\!)?)[0-9]{3})+)(?![0-9,{])"
)


def normalise(text: str) -> str:
    r"""The text without what has no meaning: spaces, `\left`, `\dfrac`, `1{,}000`, a final dot.

    Args:
      text: at most `MAX_CHARACTERS`.

    >>> normalise(r" $\left( \dfrac 12 ,\; 1{,}000 \right)$ . ")
    '(\\frac{1}{2},1000)'
    >>> normalise(r"2 \pi r")
    '2\\pi r'
    """
    tokens = [
        _RENAMED.get(token, token)
        for token in TOKEN.findall(_THOUSANDS.sub(_without_separators, text))
        if token not in _DROPPED and not token.isspace()
    ]
    pieces: list[str] = []
    for token in tokens:
        # A command ends where its letters end.
        if pieces and _COMMAND.search(pieces[-1]) and token[0].isalpha():
            pieces.append(" ")
        pieces.append(token)
    joined = "".join(pieces).removesuffix(".")
    joined = _TWO_DIGITS.sub(r"\\frac{\1}{\2}", joined)
    joined = _DIGIT_AND_GROUP.sub(r"\\frac{\1}{", joined)
    joined = _BARE_ARGUMENT.sub(r"\1\3{\2\4}", joined).replace(r"^{\circ}", r"^\circ")
    return _CONJUNCTION.sub(",", joined)


def _without_separators(match: re.Match[str]) -> str:
    return re.sub(r"[^0-9]", "", match.group())


# -- what may be read at all ------------------------------------------------------------------

_CHARACTERS = re.compile(r"[0-9A-Za-z \\{}()\[\]|+*/^_=<>.,:;!%$&'-]*")
_COMMANDS = frozenset(
    token.group()
    for token in re.finditer(
        r"\\(?:[A-Za-z]+|[^A-Za-z\s])",
        r"""
        \frac \sqrt \text \pi \infty \cdot \times \pm \mp \cup \cap \in \setminus \emptyset
        \leq \geq \neq \circ \lt \gt \to \binom \dbinom \tbinom \lfloor \rfloor \lceil \rceil
        \overline \bar \ln \log \lg \exp \sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan
        \sinh \cosh \tanh \mathbb \alpha \beta \gamma \delta \epsilon \varepsilon \theta \lambda
        \mu \nu \rho \sigma \tau \phi \varphi \omega \Delta \Omega \Phi \angle \triangle
        \begin \end \imath \{ \} \| \% \$ \\
        """,
    )
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{([a-zA-Z]*)\}")
_MATRICES = frozenset(["pmatrix", "bmatrix", "vmatrix", "matrix"])
_IN_BASE = re.compile(r"-?[0-9]+_\{[0-9]{1,2}\}")
_SIGNS = re.compile(r"[+-]{3}|\|{3}")
_FUNCTION = re.compile(
    r"\\(?:sqrt|log|ln|lg|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)(?![A-Za-z])"
)
_NUMBER_RUN = re.compile(r"[0-9]+")


def unreadable(text: str) -> str | None:
    r"""Why no answer has this form, or None for one that may be read.

    This judges form alone, in linear time, before anything of the answer is evaluated: characters,
    LaTeX commands, depth, lengths of numbers, and powers and factorials whose value would not fit
    in a book. Such an answer is *wrong*: it is the model that wrote it, and were it merely
    invalid, a model could escape a penalty by writing it.

    Args:
      text: normalised.

    >>> unreadable("9^{9^{9}}"), unreadable(r"\frac{1}{2}")
    ('a power of a number in an exponent', None)
    """
    if len(text) > MAX_CHARACTERS:
        return f"more than {MAX_CHARACTERS} characters"
    if not text:
        return "nothing"
    if _CHARACTERS.fullmatch(text) is None or "__" in text or "**" in text:
        return "characters that no formula has"
    for token in TOKEN.findall(text):
        if token[0] == "\\" and token not in _COMMANDS:
            return f"the command {token}"
    if any(name not in _MATRICES for name in _ENVIRONMENT.findall(text)):
        return "an environment other than a matrix"
    digits = max((len(run) for run in _NUMBER_RUN.findall(text)), default=0)
    if digits > MAX_DIGITS:
        return f"a number of more than {MAX_DIGITS} digits"
    if r"binom" in text and digits > 4:
        return "a binomial coefficient of large numbers"
    if re.search("[0-9]_", text) and _IN_BASE.fullmatch(text) is None:
        return "a subscript on a number"  # which sympy's reader would drop
    if _SIGNS.search(text) or len(_FUNCTION.findall(text)) > MAX_FUNCTIONS:
        return "a chain of signs or functions"
    return _brackets(text) or _factorials(text) or _powers(text)


def _brackets(text: str) -> str | None:
    depth = braces = 0
    for token in TOKEN.findall(text):
        depth += (token in ("{", "(", "[", r"\{")) - (token in ("}", ")", "]", r"\}"))
        braces += (token == "{") - (token == "}")
        if depth > MAX_DEPTH:
            return f"brackets more than {MAX_DEPTH} deep"
        if braces < 0:
            return "unbalanced braces"
    return "unbalanced braces" if braces else None


_FACTORIAL = re.compile(r"(?<![0-9])(?:[0-9]{1,3}|[A-Za-z])!(?![!^])")


def _factorials(text: str) -> str | None:
    """Factorials of numbers below 1000 and of letters, or one of a bracket with small numbers."""
    count = text.count("!")
    if count <= min(4, len(_FACTORIAL.findall(text))):
        return None
    if count == 1 and ")!" in text and sum(map(str.isdigit, text)) <= 3:
        return None
    return "a factorial of more than a number of three digits"


_DOUBLE_POWER = re.compile(r"\^\{[^{}]*\}\^")


def _powers(text: str) -> str | None:
    """Bounds exponents: of four digits, of two on a bracket, and powers of letters inside."""
    if _DOUBLE_POWER.search(text):
        return "two exponents in a row"
    size = 1
    for start in (i for i, character in enumerate(text) if character == "^"):
        exponent = _argument(text, start + 1)
        if re.search(r"(?<![A-Za-z])\^(?!\\circ)", exponent) or exponent.count("^") > 1:
            return "a power of a number in an exponent"
        digits = "".join(_NUMBER_RUN.findall(exponent))
        bound = 2 if text[start - 1 : start] in (")", "]", "}") else 4
        if len(digits) > bound or "!" in exponent:
            return f"an exponent of more than {bound} digits"
        size *= max(int(digits or 1), 1)
    return "powers of powers" if size > 10**6 else None


def _argument(text: str, start: int) -> str:
    """What a command or operator before `start` applies to."""
    if text[start : start + 1] != "{":
        token = TOKEN.match(text, start)
        return "" if token is None else token.group()
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return text[start:]
