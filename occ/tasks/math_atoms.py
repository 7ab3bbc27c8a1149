"""The smallest parts of answers: names, functions, brackets, LaTeX commands."""

from __future__ import annotations

from typing import Any

from occ.tasks import math_units
from occ.tasks.math_cursor import Cursor
from occ.tasks.math_nodes import (
    INFINITY,
    MINUS,
    ONE,
    determinant,
    literal,
    need_scalar,
    negative,
    number,
    product,
    quotient,
)
from occ.tasks.math_tokens import Token, UnreadableError

Node = Any

MAX_DEPTH = 24  # of brackets
ACCENTS = frozenset(
    [
        "overline",
        "bar",
        "hat",
        "tilde",
        "dot",
        "ddot",
        "widehat",
        "widetilde",
        "underline",
        "check",
        "breve",
    ]
)
MONEY = {"$": "dollar", "€": "euro", "£": "gbp", "¥": "yuan", "¢": "cent"}
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "langle": ("rangle",)}
_MATRICES = frozenset(
    ["pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array", "vmatrix"]
)
_FUNCTIONS_OF_UNKNOWN_FORM = frozenset("fghFGH")
_FRACTION_OPERATORS = frozenset(["d", "partial"])


class Atoms(Cursor):
    """Reads atoms."""

    def digit_or_group(self) -> Node:
        r"""An argument of `\frac`: of several digits the first."""
        token = self.peek()
        if token.kind == "num" and len(token.text) > 1:
            rest = Token("num", token.text[1:])
            self.tokens[self.place : self.place + 1] = [Token("num", token.text[0]), rest]
        return self.argument()

    def atom(self) -> Node:
        """A number, letter, function, name, bracket or command."""
        token = self.take()
        if token.kind == "num":
            return self.in_base(token) if self.at("_") else number(literal(token.text))
        if token.kind == "let":
            return self.letter(token.text)
        if token.kind == "fn":
            return self.function(token.text)
        if token.kind == "word":
            return self.name(token)
        if token.kind == "op":
            self.place -= 1
            return self.bracketed()
        if token.kind == "cmd":
            return self.command(token.text)
        raise UnreadableError("it ends too early")

    def in_base(self, token: Token) -> Node:
        """A number with its base as an index."""
        self.expect("_")
        value = self.argument()
        words = {"two": 2, "three": 3, "eight": 8, "ten": 10}
        base = value[1] if value[0] == "num" and value[2] == 1 else words.get(str(value[-1]), 0)
        if not token.text.isdigit() or not 2 <= base <= 36 or max(map(int, token.text)) >= base:
            raise UnreadableError("an index on a number")
        return ("base", token.text, base)

    def name(self, first: Token) -> Node:
        """Words where a formula has a variable, as "Area = 5"."""
        words = [first.text]
        while self.peek().kind == "word" and self.peek().text not in ("and", "or"):
            words.append(self.take().text)
        if math_units.phrase(list(words)) is None:
            raise UnreadableError(f"the words {' '.join(words)!r}")
        return ("sym", " ".join(words))

    def letter(self, name: str) -> Node:
        """A letter with its index; a function of unknown form with its argument."""
        name = self.indexed(name)
        if name in ("e", "i", "pi"):
            return (name,)
        symbol = ("sym", name)
        if not self.at("("):
            return symbol
        inside, end = [], self.place + 1
        while end < len(self.tokens) and self.tokens[end].text != ")":
            inside.append(self.tokens[end])
            end += 1
        simple = len(inside) == 1 and inside[0].kind in ("num", "let") and inside[0].text != name
        if simple or name.rstrip("'") in _FUNCTIONS_OF_UNKNOWN_FORM:
            self.take()
            arguments, _ = self.items()
            self.expect(")")
            for argument in arguments:
                need_scalar(argument)
            return ("app", name, *arguments)
        return symbol

    def indexed(self, name: str) -> str:
        """A name with its index and primes."""
        while True:
            if self.accept("_"):
                name += "_" + self.flat()
            elif self.accept("'"):
                name += "'"
            elif self.at("^") and self.peek(1).text == "'":
                self.place += 2
                name += "'"
            elif self.at("^") and self.peek(1).text == "{" and self.peek(2).text in ("'", "*"):
                self.place += 1
                name += "^" + self.flat()
                name = name.replace("^''", "''").replace("^'", "'")
            else:
                return name

    def flat(self) -> str:
        """The text of an argument, for names."""
        if not self.at("{"):
            token = self.take()
            if token.kind == "end":
                raise UnreadableError("it ends too early")
            if token.kind in ("cmd",) and token.text in ACCENTS:
                return token.text + self.flat()
            return token.text
        depth = 0
        texts: list[str] = []
        while True:
            token = self.take()
            if token.kind == "end":
                raise UnreadableError("unbalanced braces")
            depth += (token.text == "{") - (token.text == "}")
            if depth == 0:
                return "".join(texts)
            if token.text not in "{}":
                texts.append(token.text)

    def function(self, name: str) -> Node:
        """A known function with base, exponent and argument."""
        base: list[Node] = []
        power: Node | None = None
        while self.at("^", "_"):
            if self.take().text == "_":
                if name != "log":
                    raise UnreadableError(f"an index on {name}")
                base = [self.argument()]
            else:
                power = self.argument()
        if power == MINUS and not name.startswith(("arc", "l", "e")):
            name, power = f"arc{name}", None
        if self.at("(", "{", "[", "|"):
            inside = self.bracketed()
        else:
            parts = [self.power()]
            while self.begins_factor() and self.peek().kind != "fn" and not self.at("(", "["):
                parts.append(self.power())
            inside = product(parts)
        for part in (inside, *base):
            need_scalar(part)
        value = ("pow", ("e",), inside) if name == "exp" else ("fn", name, inside, *base)
        return value if power is None else ("pow", value, power)

    def bracketed(self) -> Node:
        """What stands in brackets of any kind, or after a sign of money."""
        opening = self.peek().text
        if opening in ("|", "\\|"):
            return self.bar(opening)
        if opening == "{":
            return self.group()
        if opening in MONEY:
            self.take()
            return ("qty", self.power(), math_units.word(MONEY[opening]))
        if opening == "\\{":
            return self.set()
        if opening not in ("(", "["):
            raise UnreadableError(f"{opening!r} where a number should be")
        return self.tuple_of(self.take().text)

    def deeper(self) -> None:
        """Counts brackets.

        Raises:
          UnreadableError: there are too many.
        """
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(f"brackets more than {MAX_DEPTH} deep")

    def tuple_of(self, opening: str) -> Node:
        """A formula in brackets, or a tuple."""
        self.deeper()
        bars, self.bars = self.bars, 0
        items, separators = self.items()
        closing = self.expect(*_CLOSING[opening])
        self.bars, self.depth = bars, self.depth - 1
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return items[0]
        if len(items) == 1 or any(separator != "," for separator in separators):
            raise UnreadableError("brackets around what is no list")
        brackets = "<>" if opening == "langle" else opening + closing
        return ("tuple", brackets, *items)

    def group(self) -> Node:
        """What stands in braces."""
        self.expect("{")
        self.deeper()
        bars, self.bars = self.bars, 0
        items, _ = self.items()
        self.expect("}")
        self.bars, self.depth = bars, self.depth - 1
        return items[0] if len(items) == 1 else ("set", *items)

    def set(self) -> Node:
        """A set, by its elements or by a condition."""
        self.expect("\\{")
        self.deeper()
        if self.accept("\\}"):
            self.depth -= 1
            return ("set",)
        bars, self.bars = self.bars, 1
        items = self.items_of_set()
        self.expect("\\}")
        self.bars, self.depth = bars, self.depth - 1
        return items if isinstance(items, tuple) else ("set", *items)

    def items_of_set(self) -> Any:
        """Items, or for `{x | ...}` what stands after the bar."""
        start = self.place
        variable = self.peek()
        if variable.kind == "let":
            self.take()
            if self.at("in") and self.peek(1).text == "mathbb":
                self.place += 2
                self.flat()
            if self.accept("|", ":"):
                condition = self.listed()
                if condition[0] not in ("rel", "list"):
                    raise UnreadableError("a set without a condition")
                return condition
            self.place = start
        return self.items()[0]

    def bar(self, opening: str) -> Node:
        """An absolute value."""
        self.take()
        self.deeper()
        self.bars += 1
        inside = self.sum()
        self.expect(opening)
        self.bars -= 1
        self.depth -= 1
        need_scalar(inside)
        return ("fn", "abs", inside)

    # -- commands -----------------------------------------------------------------------------

    def command(self, name: str) -> Node:
        """A LaTeX command with its arguments."""
        if name == "frac":
            self.place -= 1
            return self.fraction()
        if name == "binom":
            over, under = self.digit_or_group(), self.digit_or_group()
            return ("fn", "binom", over, under)
        if name == "sqrt":
            return self.root()
        if name == "infty":
            return INFINITY
        if name == "emptyset":
            return ("set",)
        if name in ("lfloor", "lceil"):
            inside = self.sum()
            self.expect("r" + name[1:])
            need_scalar(inside)
            return ("fn", name[1:], inside)
        if name == "langle":
            return self.tuple_of("langle")
        if name == "mathbb":
            letter = self.flat()
            return (
                ("tuple", "()", negative(INFINITY), INFINITY) if letter == "R" else ("sym", letter)
            )
        if name in ("mathcal", "mathscr", "mathfrak", "vec", "overset"):
            return self.letter(self.flat())
        if name in ACCENTS:
            return self.letter(f"{name}:{self.flat()}")
        if name in ("angle", "triangle", "Delta"):
            letters = ""
            while self.peek().kind == "let":
                letters += self.indexed(self.take().text)
            return ("sym", f"{name}:{letters}")
        if name == "begin":
            return self.matrix()
        raise UnreadableError(f"the command \\{name}")

    def fraction(self) -> Node:
        """A quotient, or a derivative, which is a name."""
        self.expect("frac")
        start = self.place
        over = self.digit_or_group()
        middle = self.place
        under = self.digit_or_group()
        for part in (over, under):
            need_scalar(part)
        above = [token for token in self.tokens[start:middle] if token.text not in "{}"]
        below = [token for token in self.tokens[middle : self.place] if token.text not in "{}"]
        if (
            above[0].text in _FRACTION_OPERATORS
            and len(below) > 1
            and below[0].text == above[0].text
            and below[1].kind == "let"
        ):
            texts = ["".join(token.text for token in side) for side in (above, below)]
            return ("sym", "/".join(texts))
        return quotient(over, under)

    def root(self) -> Node:
        """A root, square or with a degree."""
        degree: Node = number(2)
        if self.accept("["):
            degree = self.sum()
            self.expect("]")
        inside = self.bracketed() if self.at("(") else self.argument()
        for part in (inside, degree):
            need_scalar(part)
        return ("pow", inside, quotient(ONE, degree))

    def matrix(self) -> Node:
        """A matrix; a determinant as its value."""
        kind = self.flat()
        if kind not in _MATRICES:
            raise UnreadableError(f"the environment {kind}")
        if kind == "array":
            self.flat()
        self.deeper()
        rows: list[list[Node]] = [[]]
        while True:
            cell = self.sum()
            need_scalar(cell)
            rows[-1].append(cell)
            if self.accept("&"):
                continue
            if self.accept("\\\\"):
                if self.at("end"):
                    break
                rows.append([])
            else:
                break
        self.expect("end")
        self.depth -= 1
        if self.flat() != kind or len({len(row) for row in rows}) > 1:
            raise UnreadableError("a matrix with rows of unlike lengths")
        if kind == "vmatrix":
            return determinant(rows)
        return ("matrix", *(tuple(row) for row in rows))
