"""What a task asks of a tokenizer; and one of characters, for models that fit a laptop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

PAD_ID = 0
END_ID = 1
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_RESERVED = 2


class Tokenizer(Protocol):
    """Text to token ids and back, with the tokens that end a response.

    `CharacterTokenizer` and `pretrained_tokenizer.PretrainedTokenizer` are such.
    """

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included; a model may have more, never fewer."""
        ...

    @property
    def pad_id(self) -> int:
        """Token that stands where there is none."""
        ...

    @property
    def end_id(self) -> int:
        """Token that ends a demonstration; one of `end_ids`."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Any of these ends a response."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end token."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of what a model is to go on from: where it expects one, a token before it."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first end token; padding and other special tokens left out."""
        ...

    def decode_batch(self, ids: np.ndarray, mask: np.ndarray) -> list[str]:
        """Texts of the masked-in tokens of each row.

        Args:
          ids: int [B, T].
          mask: bool [B, T].
        """
        return [self.decode(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]


class CharacterTokenizer(Tokenizer):
    """One token a character; token 0 is padding, token 1 ends a response.

    Args:
      alphabet: the characters, each once; their order gives the ids from 2 on.

    Raises:
      ValueError: a character occurs twice.

    >>> tokenizer = CharacterTokenizer("0123456789+-=")
    >>> tokenizer.encode("1+2=")
    [3, 12, 4, 14]
    >>> tokenizer.decode([3, 12, 4, 14, 1, 7])
    '1+2='
    """

    pad_id = PAD_ID
    end_id = END_ID
    end_ids = (END_ID,)

    def __init__(self, alphabet: str):
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"CharacterTokenizer: a character occurs twice in {alphabet!r}.")
        self.alphabet = alphabet
        self._ids = {character: i + _RESERVED for i, character in enumerate(alphabet)}

    @property
    def vocab_size(self) -> int:
        """Tokens, padding and end included."""
        return len(self.alphabet) + _RESERVED

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without an end token.

        Raises:
          ValueError: a character that is not in the alphabet.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"CharacterTokenizer: character {error.args[0]!r} of {text!r} is not in the "
                f"alphabet {self.alphabet!r}. Add it to the alphabet, or change the text."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text before the first end token, padding left out."""
        characters = []
        for token in ids:
            if token == END_ID:
                break
            if token >= self.vocab_size:
                characters.append(UNKNOWN)  # a model may have more tokens than the tokenizer
            elif token >= _RESERVED:
                characters.append(self.alphabet[token - _RESERVED])
        return "".join(characters)
