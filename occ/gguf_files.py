"""GGUF files, opened after what they say of their own size was compared with their size.

The library's reader believes a file: it walks on through an array of 2^40 numbers, or of dimensions
that no tensor has, for as long as that takes. Here the header is walked once before, and each
length is held against the bytes that are left.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import pathlib
import struct
from typing import Any

from occ.extras import require

require("pretrained", __name__, "gguf")
import gguf

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


def open_gguf(path: str | pathlib.Path) -> gguf.GGUFReader:
    """A reader of the file's fields and tensors.

    Raises:
      ValueError: it is no GGUF file, or not a whole one; the file is named.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
        return gguf.GGUFReader(path)
    except (ValueError, LookupError, ArithmeticError, TypeError, UnicodeError) as error:
        raise ValueError(f"{path} is no whole GGUF file ({error}). Download it again.") from error


class _Header:
    """A place in a file's header."""

    def __init__(self, data: Any):
        self.data, self.place = data, 0

    def check(self) -> None:
        """Walks from the first byte to the tensors' data.

        Raises:
          ValueError: something is longer than what is left of the file.
        """
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self.skip(4)
        version = self.integer(4)
        if version not in (2, 3):
            raise ValueError(f"expected version 2 or 3, little-endian, got {version}")
        tensors, fields = self.integer(8), self.integer(8)
        for _ in range(fields):
            self.string()
            self.value(self.integer(4))
        for _ in range(tensors):
            self.string()
            dimensions = self.integer(4)
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self.skip(8 * dimensions + 4 + 8)  # shape, type, offset

    def skip(self, size: int) -> None:
        """Goes past so many bytes."""
        left = len(self.data) - self.place
        if size > left:
            raise ValueError(f"{size} bytes are announced at byte {self.place}, {left} are left")
        self.place += size

    def integer(self, size: int) -> int:
        """Reads one of 4 or 8 bytes."""
        begin = self.place
        self.skip(size)
        return int(struct.unpack_from("<I" if size == 4 else "<Q", self.data, begin)[0])

    def string(self) -> None:
        """Goes past a string."""
        self.skip(self.integer(8))

    def value(self, kind: int, inside: bool = False) -> None:
        """Goes past a field's value."""
        if kind == _STRING:
            self.string()
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _ARRAY and not inside:
            kind, count = self.integer(4), self.integer(8)
            if kind in _SIZES:
                self.skip(_SIZES[kind] * count)
            else:
                for _ in range(count):  # each has a length, so that the file's end ends it
                    self.value(kind, inside=True)
        else:
            raise ValueError(f"a field of unknown kind {kind} at byte {self.place}")
