r"""The typography of an answer: characters that LaTeX has commands for, Markdown, quotes."""
# ruff: noqa: RUF001 - such characters are what this file is about

from __future__ import annotations

import re
import unicodedata

from occ.tasks.math_units import names

GREEK = names(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma "
    "tau upsilon phi chi psi omega"
)
_CAPITALS = [name.capitalize() for name in GREEK]
LETTERS = frozenset([*GREEK, *_CAPITALS, "hbar", "ell", "partial", "nabla", "mho", "eth", "aleph"])
VARIANTS = {f"var{name}": name for name in ("epsilon", "theta", "phi", "rho", "sigma", "kappa")}

_CHARACTERS = {
    **{chr(0x3B1 + i + (i > 16)): rf"\{name} " for i, name in enumerate(GREEK)},
    **{chr(0x391 + i + (i > 16)): rf"\{name} " for i, name in enumerate(_CAPITALS)},
    **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}", "-"),
    **dict.fromkeys(
        "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\N{FIGURE SPACE}", " "
    ),
    **dict.fromkeys("\N{IDEOGRAPHIC SPACE}\N{EM SPACE}\N{EN SPACE}\t\r\n", " "),
    **{"。": ".", "、": ",", "…": r"\ldots "},
    **{
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "∙": r"\cdot ",
        "÷": "/",
        "∕": "/",
        "⁄": "/",
    },
    **{
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "°": r"^\circ ",
        "º": r"^\circ ",
        "±": r"\pm ",
        "∓": r"\mp ",
    },
    **{"≤": r"\leq ", "≥": r"\geq ", "⩽": r"\leq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus "},
    **{
        "ℝ": r"\mathbb{R}",
        "ℤ": r"\mathbb{Z}",
        "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}",
    },
    **{
        "∠": r"\angle ",
        "△": r"\triangle ",
        "′": "'",
        "″": "''",
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
    },
    **{
        "⌊": r"\lfloor ",
        "⌋": r"\rfloor ",
        "⌈": r"\lceil ",
        "⌉": r"\rceil ",
        "∶": ":",
        "ϕ": r"\phi ",
    },
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "￥": "¥", "−": "-", "µ": r"\mu ", "ℓ": r"\ell "},
}
_TABLE = str.maketrans(_CHARACTERS)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_FORMS = re.compile(r"[\uff01-\uff5e\U0001d400-\U0001d7ff]+")  # full-width, and letters of formulas


def typography(text: str) -> str:
    r"""Characters that LaTeX has commands for, full-width ones and raised digits as ASCII.

    >>> typography("−3×10⁻⁵½")
    '-3\\times 10^{-5}\\frac{1}{2}'
    """
    text = re.sub(r"\\left\s*<", r"\\langle ", re.sub(r"\\right\s*>", r"\\rangle ", text))
    text = text.replace("∛", r"\sqrt[3]").replace("∜", r"\sqrt[4]")
    text = _FORMS.sub(lambda found: unicodedata.normalize("NFKC", found.group()), text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda run: f"^{{{run.group().translate(_RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋]+", lambda run: f"_{{{run.group().translate(_LOWERED)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar, text)
    return text.translate(_TABLE)


def _vulgar(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match.group()).partition("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


_LEAD = re.compile(
    # "The number of ways is", unless it says what is not the answer.
    r"(?![A-Za-z ]*\b(?:no|not|none|never|neither|nor|wrong|false|incorrect)\b)"
    r"(?![A-Za-z ]*\b(?:more|less|than|if|one|two)\b)"
    r"[A-Z][a-z]*(?:\s[a-z]+){0,8}\s(?:is|are|equals)\s*:?\s+(?![a-z])|"
    r"\\text\{(?![^{}]*\b(?:no|not|wrong)\b)[^{}]*\b(?:answer|result|solution)\b[^{}]*\}\s*[=:]?\s*|"
    r"(?:(?:so|thus|hence|therefore),?\s+)?"
    r"(?:(?:the|my|our|final|correct|right|required|value|of|[A-Za-z])\s+)*?"
    r"(?:answer|result|solution|value)\s*(?:is\s*:?|equals|=|:|\\approx)\s*",
    re.IGNORECASE,
)


_FINAL = re.compile(r"(?:\\,|\\;|\\!|\\ |\\|(?<!\.)[.,;。])\s*\Z")
_DELIMITERS = ((r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$"))
_TAG = re.compile(r"</?(?:b|i|strong|em|code|p|span|u)>", re.IGNORECASE)
# A sentence after the answer, or words in brackets.
_TAIL = re.compile(
    r"([0-9A-Za-z)}$\]])(?:\.\$?\s+(?=[A-Z][a-z]*\s)(?!.*\b(?:not|no|wrong|but)\b)[A-Za-z ,']+"
    r"|(?<=[0-9}$])\s+\((?!.*\b(?:not|no)\b)[a-z][a-z -]{3,}\))\Z"
)


def bare(text: str) -> str:
    r"""The answer without Markdown, quotes, a final dot, or "the answer is" around it.

    >>> bare("**29**."), bare("`29`"), bare("The answer is $29$.")
    ('29', '29', '29')
    """
    text = _TAG.sub("", text)
    before = None
    while text != before:
        before = text
        text = text.strip("`*_ ")
        text = _FINAL.sub("", text)
        if len(text) > 1 and text[0] == text[-1] and text[0] in "_\"'":
            text = text[1:-1]
        for opening, closing in _DELIMITERS:
            inside = text[len(opening) : -len(closing)]
            if text == opening + inside + closing and opening not in inside:
                text = inside
    lead = _LEAD.match(text)
    if lead and lead.end() < len(text):
        return bare(text[lead.end() :])
    return _TAIL.sub(r"\1", text)
