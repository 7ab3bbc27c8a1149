"""A parser of mathematical answers, by recursive descent; `math_reading` says what it decides."""

from __future__ import annotations

import re
from typing import Any

from occ.tasks import math_units
from occ.tasks.math_atoms import ACCENTS, MONEY, Atoms
from occ.tasks.math_cursor import END
from occ.tasks.math_nodes import (
    MINUS,
    ONE,
    add,
    mixed,
    need_scalar,
    negative,
    number,
    product,
    quotient,
    without_degrees,
)
from occ.tasks.math_tokens import UnreadableError

Node = Any

MAX_ITEMS = 100  # of a list

RELATIONS = {
    **{"=": "=", "<": "<", ">": ">", "leq": "<=", "geq": ">=", "neq": "!="},
    **{"in": "in", "approx": "~", "equiv": "equiv"},
}
_BEGINNING = ACCENTS.union(
    ["frac", "binom", "sqrt", "lfloor", "lceil", "mathbb", "mathcal", "vec", "begin", "infty"]
)


class Parser(Atoms):
    """Reads tokens from left to right, as one value.

    Args:
      found: of `math_tokens.tokens`.
      letters_are_units: a letter that a unit may be, after a number and a space at the end.
    """

    # -- lists and relations ------------------------------------------------------------------

    def whole(self) -> Node:
        """The value of all tokens."""
        value = self.listed()
        if self.peek() is not END:
            raise UnreadableError(f"{self.peek().text!r} after the end")
        return value

    def listed(self) -> Node:
        """What stands between brackets, or all: one item or several."""
        items, separators = self.items()
        return items[0] if len(items) == 1 else ("list", tuple(separators), *items)

    def items(self) -> tuple[list[Node], list[str]]:
        """Items and what stands between them."""
        items: list[Node] = [self.relation()]
        separators: list[str] = []
        while True:
            separator = self.separator()
            if not separator:
                return items, separators
            items.append(self.relation())
            separators.append(separator)
            if len(items) > MAX_ITEMS:
                raise UnreadableError(f"more than {MAX_ITEMS} items")

    def separator(self) -> str:
        """A comma or word between items; empty without one."""
        found = ""
        while True:
            if self.accept(",", ";"):
                found = found or ","
            elif self.peek().kind == "word" and self.peek().text.lower() in ("and", "or"):
                found = self.take().text.lower()
            else:
                return found

    def relation(self) -> Node:
        """Values with relations between them."""
        self.accept("approx", "=")
        sides, signs = [self.united()], []
        while self.peek().text in RELATIONS and self.peek().kind in ("op", "cmd"):
            sign = RELATIONS[self.take().text]
            if sign in "<>" and self.accept("="):
                sign += "="
            signs.append(sign)
            sides.append(self.united())
        value = ("rel", tuple(signs), *sides) if signs else sides[0]
        return self.modulus(value)

    def modulus(self, value: Node) -> Node:
        """A value with what may stand after it as its modulus."""
        if self.accept("pmod"):
            divisor = self.argument()
        elif self.at("(") and self.peek(1).text == "mod":
            self.place += 2
            divisor = self.sum()
            self.expect(")")
        else:
            return value
        if value[0] == "rel":
            if value[1] not in (("equiv",), ("=",)):
                raise UnreadableError("a modulus after a relation")
            return ("rel", ("=",), value[2], ("cong", value[3], divisor))
        return ("cong", value, divisor)

    def united(self) -> Node:
        """Sets with unions and differences."""
        value = self.measured()
        while self.at("cup", "cap", "setminus"):
            operator = self.take().text
            other = self.measured()
            if operator == "cap":
                raise UnreadableError("an intersection")
            if operator == "cup":
                value = ("union", *(value[1:] if value[0] == "union" else [value]), other)
            else:
                value = ("diff", value, other)
        return value

    # -- numbers with units, times, ratios ------------------------------------------------------

    def measured(self) -> Node:
        """A number with its unit, a time, a ratio."""
        time = self.time()
        if time is not None:
            return time
        value = self.sum()
        if self.accept("choose"):
            return ("fn", "binom", value, self.sum())
        if self.at(":"):
            parts = [value]
            while self.accept(":"):
                parts.append(self.sum())
            return ("ratio", *parts)
        if self.peek().kind == "word" and self.peek().text == "to":
            self.take()
            return ("ratio", value, self.sum())
        value, in_degrees = without_degrees(value)
        unit = self.unit(in_degrees)
        if unit is None:
            return value
        if value[0] == "qty":
            if value[2] != math_units.NONE and unit[1] == value[2][1]:
                return value  # "$5 dollars"
            if not unit[1]:
                return ("qty", value[1], math_units.times(value[2], unit))  # "$5 million"
            raise UnreadableError("two units")
        return ("qty", value, unit)

    def time(self) -> Node | None:
        """A time of day: "8:00", "3 p.m."."""
        start = self.place
        if self.peek().kind != "num" or not re.fullmatch("[0-9]{1,2}", self.peek().text):
            return None
        minutes = 60 * int(self.take().text)
        exact = False
        if self.at(":") and re.fullmatch("[0-5][0-9]", self.peek(1).text):
            minutes += int(self.peek(1).text)
            self.place += 2
            exact = True
        meridiem = self.peek().text.lower()
        if self.peek().kind == "word" and meridiem in ("am", "pm") and minutes < 13 * 60:
            self.take()
            return ("time", minutes % 720 + 720 * (meridiem == "pm"), meridiem)
        if exact and minutes <= 24 * 60 and not self.at(":", "/", "^"):
            return ("time", minutes, "")
        self.place = start
        return None

    def unit(self, in_degrees: bool) -> math_units.Unit | None:
        """What stands after a number, or None if nothing does."""
        if in_degrees:
            if self.peek().text in ("C", "F"):
                return math_units.word({"C": "celsius", "F": "fahrenheit"}[self.take().text])
            return math_units.word("degree")
        if self.accept("%"):
            return math_units.word("percent")
        if self.at(*MONEY):
            return math_units.word(MONEY[self.take().text])
        words: list[str | int] = []
        if self.is_unit_letter():
            words.append(self.take().text)
        elif self.peek().kind != "word" or self.peek().text in ("and", "or", "to", "mod"):
            return None
        while True:
            token = self.peek()
            joined = bool(words) and words[-1] == "/"
            if (
                (token.kind == "word" and token.text not in ("and", "or"))
                or (token.kind in ("let", "fn") and (token.roman or joined))
                or (token.text == "/" and token.kind == "op")
            ):
                words.append(self.take().text)
            elif token.text == "^" and token.kind == "op":
                self.take()
                words.append(self.whole_number())
            elif token.text in (".", "cdot", "-") and words and self.peek(1).roman:
                self.take()
            else:
                break
        unit = math_units.phrase(words)
        if unit is None:
            raise UnreadableError(f"the words {' '.join(map(str, words))!r}")
        return unit

    def whole_number(self) -> int:
        """A small exponent of a unit."""
        value = self.argument()
        if value[0] != "num" or value[2] != 1 or abs(value[1]) > 9:
            raise UnreadableError("a unit with an exponent that is no small number")
        return int(value[1])

    # -- formulas -----------------------------------------------------------------------------

    def sum(self) -> Node:
        """Terms with signs."""
        total: Node | None = None
        while True:
            if self.accept("-"):
                if self.at("-", "+"):
                    raise UnreadableError("a chain of signs")
                term = negative(self.term())
                total = term if total is None else add(total, term)
            elif self.at("pm", "mp"):
                sign = self.take().text
                term = self.term()
                need_scalar(term)
                total = (sign, number(0) if total is None else total, term)
            elif self.accept("+") or total is None:
                term = self.term()
                total = term if total is None else add(total, term)
            else:
                return total
            if not self.at("+", "-", "pm", "mp"):
                return total

    def term(self) -> Node:
        """Factors, with a sign before them."""
        sign = ONE
        while self.at("-", "+"):
            if sign is MINUS:
                raise UnreadableError("a chain of signs")
            if self.take().text == "-":
                sign = MINUS
        parts = [self.factor()]
        while True:
            if self.accept("cdot", "times", "*"):
                minus = self.accept("-")
                parts.append(negative(self.factor()) if minus else self.factor())
            elif self.accept("/"):
                minus = self.accept("-")
                under = self.factor(alone=True)
                over = product(parts)
                parts = [quotient(negative(over) if minus else over, under)]
            elif self.is_times_ten():
                self.take()
            elif self.begins_factor():
                parts.append(self.factor())
            else:
                value = product(parts)
                return negative(value) if sign is MINUS else value

    def is_times_ten(self) -> bool:
        """Whether an x between numbers is a sign: "6.1x10^{14}"."""
        after = self.peek(1)
        return (
            self.peek().text in ("x", "X")
            and self.tokens[self.place - 1].kind == "num"
            and after.kind == "num"
            and (after.text == "10" or self.peek().spaced)
        )

    def begins_factor(self) -> bool:
        """Whether a factor follows."""
        token = self.peek()
        if token.kind in ("let", "fn"):
            of_temperature = token.text in ("C", "F") and self.ends_after(1) and self.after_circ()
            return not self.is_unit_letter() and not of_temperature
        if token.kind == "word":  # "2A + B" in roman type
            return len(token.text) == 1 and self.peek(1).text in ("+", "-", "=")
        if token.kind == "num":
            before = self.tokens[self.place - 1]
            if before.kind == "let" and self.peek(1).text != "^":
                return False  # "x2"
            return before.text != "}" or self.no_digits_before()
        if token.kind == "op":
            return token.text in ("(", "{", "[") or (token.text in ("|", "\\|") and not self.bars)
        return token.kind == "cmd" and token.text in _BEGINNING

    def after_circ(self) -> bool:
        """Whether a sign of degrees was read last."""
        before = [token.text for token in self.tokens[max(self.place - 2, 0) : self.place]]
        return before[-1:] == ["circ"] or before == ["circ", "}"]

    def is_unit_letter(self) -> bool:
        """Whether the next letter is a unit rather than a variable."""
        token, end = self.peek(), 1
        while self.peek(end).text in ("^", "/") and end < 5:  # "m/s^2"
            end += 2
        return (
            self.letters_are_units
            and token.spaced
            and token.text in math_units.SINGLE
            and self.tokens[self.place - 1].kind == "num"
            and self.ends_after(end)
        )

    def no_digits_before(self) -> bool:
        """Whether a group that just ended is no number, which digits would change."""
        return not any(
            token.kind == "num" for token in self.tokens[max(self.place - 2, 0) : self.place]
        )

    def factor(self, *, alone: bool = False) -> Node:
        """A power, or a number with a fraction after it."""
        token = self.peek()
        value = self.power()
        if alone or token.kind != "num" or self.tokens[self.place - 1] is not token:
            if self.peek().kind == "num" and self.tokens[self.place - 1].kind == "num":
                raise UnreadableError("digits beside digits")
            return value
        after = self.peek()
        if after.kind == "num":
            over, slash, under = after.text, self.peek(1).text, self.peek(2).text
            if slash != "/" or not (over.isdigit() and under.isdigit() and token.text.isdigit()):
                raise UnreadableError("digits beside digits")
            self.place += 3
            return mixed(value, quotient(number(int(over)), number(int(under))))
        if after.text == "frac" and after.kind == "cmd":
            start = self.place
            part = self.fraction()
            if part[0] == "num" and token.text.isdigit() and self.tokens[start + 1].text != "-":
                return mixed(value, part)
            return product([value, part])
        return value

    def power(self) -> Node:
        """An atom with exponents, factorials and signs of degrees after it."""
        value = self.atom()
        raised = False
        while True:
            if self.accept("!"):
                value = ("fn", "factorial", value)
            elif self.at("^"):
                degrees = [token.text for token in (self.peek(1), self.peek(2))]
                self.take()
                if degrees[0] == "circ":
                    self.take()
                    value = ("deg", value)
                elif degrees == ["{", "circ"]:
                    self.place += 2
                    self.expect("}")
                    value = ("deg", value)
                elif raised:
                    raise UnreadableError("two exponents in a row")
                else:
                    raised = True
                    exponent = self.argument()
                    need_scalar(value)
                    need_scalar(exponent)
                    value = ("pow", value, exponent)
            elif self.at("circ"):
                self.take()
                value = ("deg", value)
            elif self.at("%") and not self.ends_after(1):
                self.take()
                value = quotient(value, number(100))
            elif self.peek().text == "choose" and self.peek().kind == "cmd":
                return value
            else:
                if value[0] in ("fn", "deg") and value[1][0] in ("tuple", "set", "matrix"):
                    raise UnreadableError("a function of a list")
                return value

    def ends_after(self, ahead: int) -> bool:
        """Whether an item ends at a token."""
        token = self.peek(ahead)
        return token.kind in ("end", "word") or token.text in (
            *[")", "]", "}", ",", ";", "=", "<", ">", ":", "|"],
            *("\\}", "leq", "geq", "neq", "approx", "rangle", "cup", "&", "\\\\"),
        )

    def argument(self) -> Node:
        """What an exponent, an index or a command applies to."""
        token = self.peek()
        if token.text == "{" and token.kind == "op":
            return self.group()
        if token.text in ("-", "+") and token.kind == "op":
            self.take()
            value = self.argument()
            return negative(value) if token.text == "-" else value
        return self.atom()
