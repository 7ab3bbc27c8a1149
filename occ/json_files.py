"""JSON files that may be cut, damaged or of another encoding; every error says file and line."""

from __future__ import annotations

import json
import math
from typing import Any

from occ.buckets import Path


def read(file: Path) -> Any:
    """The value in a file of JSON in UTF-8, with or without a byte order mark.

    Raises:
      ValueError: it holds something else, or nothing.
    """
    return parse(file.read_bytes(), str(file))


def read_object(file: Path, *keys: str) -> dict[str, Any]:
    """The object in a file.

    Args:
      file: to read.
      *keys: that it must have.

    Raises:
      ValueError: it holds something else, or lacks a key.
    """
    return _object(read(file), str(file), keys)


def read_lines(file: Path, *keys: str, cut: bool = False) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, blank lines left out.

    Args:
      file: to read.
      *keys: that each must have.
      cut: leave out a last line that is none, as a crash in writing leaves it.

    Raises:
      ValueError: a line is none; for `cut`, one before the last.
    """
    lines = [line for line in enumerate(file.read_bytes().split(b"\n"), 1) if line[1].strip()]
    found = []
    for number, line in lines:
        where = f"{file}, line {number}"
        try:
            found.append(_object(parse(line, where), where, keys))
        except ValueError:
            if cut and number == lines[-1][0]:
                break
            raise
    return found


def parse(content: bytes, where: str) -> Any:
    """A value of JSON in UTF-8.

    Args:
      content: a file, or one of its lines.
      where: which one, for errors.

    Raises:
      ValueError: it is something else; says where, what was found there and why it cannot be read.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of the encoding, and numbers of 5000 digits too
        line = _line(content, error)
        if ", line " not in where and line:
            where = f"{where}, line {line}"
        raise ValueError(
            f"{where}: expected JSON in UTF-8, got {content[:60]!r} ({error}). Is the file cut off "
            "or of another kind? Put a whole one in its place."
        ) from error


def dump(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities, which it has no words for, are null.

    >>> dump({"reward": float("nan"), "seconds": (1.5, 2)})
    '{"reward": null, "seconds": [1.5, 2]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _object(value: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or any(key not in value for key in keys):
        wanted = f"an object with {', '.join(keys)}" if keys else "an object"
        raise ValueError(f"{where}: expected {wanted}, got {value!r:.80}.")
    return value


def _line(content: bytes, error: Exception) -> int:
    """Where in the content, from 1; 0 if that is unknown."""
    if isinstance(error, json.JSONDecodeError):
        return error.lineno
    return content[: error.start].count(b"\n") + 1 if isinstance(error, UnicodeDecodeError) else 0


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
