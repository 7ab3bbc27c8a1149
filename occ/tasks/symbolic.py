"""Whether two LaTeX answers are mathematically equal, by math-verify; for worker processes only.

Reading an answer means building sympy expressions from it, and comparing means simplifying them:
both can take for ever. Time-outs are the business of the pool (`occ.tasks.workers`), which loads
this file by its path; so the library's are off, and nothing of the package is imported here.

It judges what `occ.tasks.math_reading` does not read: integrals, sums, products, limits.

Of math-verify only the comparison is used. Its own `parse` searches free text with heuristics of
its own, strips the letters of units ("3t" becomes 3), and hands plain expressions to sympy's
`parse_expr`, which evaluates text as Python; here LaTeX goes to the grammar-based reader alone.
That reader and sympy still compile some text of their own making; `PROGRAMS` says which.
"""

from __future__ import annotations

import re
from typing import Any

import sympy
import sympy.physics.units  # which sympy would import at the first conversion, slowly
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy.matrices.exceptions import ShapeError

NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
# Decimal places at which a decimal counts as equal to a number that is not one.
PLACES = 10

# What may be compiled in a worker: numbers and symbols, which sympy reads by evaluating them
# ("Integer (12 )"), closed forms that mpmath has found for a number ("sqrt (Integer (20 ))"), and
# the arithmetic of exponents that its polynomials generate. None can name anything but sympy's
# numbers and these functions: there is no dot outside quotes, and no bracket.
PROGRAMS = re.compile(
    r"from sympy import \*"
    r"|(?:Integer|Float|Rational|Symbol|E|pi|sqrt|exp|log|[-+*/() ]|[0-9]|'[0-9A-Za-z_.+-]*')+"
    r"|def monomial_[a-z]+\([A-Za-z, ]+\):\n[0-9A-Za-z_\s()+,*=<>:-]*"
)


def read(latex: str, *, real: bool = True) -> Any:
    r"""The sympy object that an answer denotes, or None if the grammar does not know it.

    Args:
      latex: an answer.
      real: whether symbols stand for real numbers; if not, i is the imaginary unit.

    >>> read(r"2\sqrt{3}"), read("2+")
    (2*sqrt(3), None)
    """
    try:
        result = latex2sympy(
            normalize_latex(latex, config=NORMALIZATION),
            is_real=real,
            convert_degrees=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except ShapeError:
        return None  # a product or sum of matrices that do not fit denotes nothing
    except Exception as error:
        # A syntax error is a bare Exception there; whatever else it raises is a failure.
        if type(error) is not Exception:
            raise
        return None
    if real:
        return result
    return result.subs({symbol: sympy.I for symbol in result.free_symbols if symbol.name == "i"})


def prepare() -> None:
    """Uses what sympy imports and makes at its first use: classes, by compiling their methods."""
    for reference, answer in [
        (r"\int_{0}^{1} x dx", r"\frac{1}{2}"),
        (r"\sum_{k=1}^{4} k", "10"),
        (r"\prod_{k=1}^{4} k", "24"),
        (r"\lim_{x\to 0}\frac{\sin x}{x}", "1"),
    ]:
        equivalent(reference, answer)


def equivalent(reference: str, answer: str) -> bool | None:
    """Whether an answer equals the reference.

    Args:
      reference, answer: LaTeX.

    Returns:
      False too for an answer that is no formula; None if the reference is none.

    >>> equivalent("(x+1)^{2}", "x^{2}+2x+1"), equivalent("x+1", "x+"), equivalent("x+", "x")
    (True, False, None)
    """
    # One choice for both, or x would be two symbols.
    real = not (should_treat_as_complex(reference) or should_treat_as_complex(answer))
    expected = read(reference, real=real)
    if expected is None:
        return None
    found = read(answer, real=real)
    if found is None:
        return False
    return verify(
        expected,
        found,
        float_rounding=PLACES,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
