"""A place among the tokens of an answer, and what its readers need of each other."""

from __future__ import annotations

import abc
from typing import Any

from occ.tasks.math_tokens import Token, UnreadableError

Node = Any

END = Token("end", "")


class Cursor(abc.ABC):
    """A place among tokens.

    Args:
      found: of `math_tokens.tokens`.
      letters_are_units: a letter that a unit may be, after a number and a space at the end.
    """

    def __init__(self, found: list[Token], letters_are_units: bool = False):
        self.tokens, self.place = found, 0
        self.letters_are_units = letters_are_units
        self.depth = self.bars = 0

    # -- tokens -------------------------------------------------------------------------------

    def peek(self, ahead: int = 0) -> Token:
        """The token at the place, or some places ahead."""
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else END

    def take(self) -> Token:
        """The next token; goes on."""
        token = self.peek()
        self.place += 1
        return token

    def at(self, *texts: str) -> bool:
        """Whether the next token is one of these signs or commands."""
        token = self.peek()
        return token.kind in ("op", "cmd") and token.text in texts

    def accept(self, *texts: str) -> bool:
        """Goes past one of these signs or commands, if it is next."""
        if self.at(*texts):
            self.place += 1
            return True
        return False

    def expect(self, *texts: str) -> str:
        """Goes past one of these signs or commands.

        Raises:
          UnreadableError: another one is next.
        """
        token = self.take()
        if token.kind not in ("op", "cmd") or token.text not in texts:
            raise UnreadableError(f"expected {texts[0]!r}, got {token.text or 'the end'!r}")
        return token.text

    # -- what `math_parser.Parser` adds -------------------------------------------------------

    @abc.abstractmethod
    def items(self) -> tuple[list[Node], list[str]]:
        """Items and what stands between them."""

    @abc.abstractmethod
    def listed(self) -> Node:
        """Items as one value."""

    @abc.abstractmethod
    def sum(self) -> Node:
        """A sum."""

    @abc.abstractmethod
    def power(self) -> Node:
        """An atom with its exponent."""

    @abc.abstractmethod
    def argument(self) -> Node:
        """What an exponent, an index or a command applies to."""

    @abc.abstractmethod
    def begins_factor(self) -> bool:
        """Whether a factor follows."""
