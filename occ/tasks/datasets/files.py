"""Rows of released files, one at a time, and what a wrong one is told by."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow.parquet

from occ.tasks.datasets.published import Published

ROWS_AT_A_TIME = 8192


class Row(NamedTuple):
    """One problem of a file.

    Attributes:
      identity: the set's own, or else file and row.
      problem, answer: bare texts.
      subject, level: texts; empty where the set has none.
    """

    identity: str
    problem: str
    answer: str
    subject: str
    level: str


def rows(file: pathlib.Path, published: Published, name: str) -> Iterator[Row]:
    """The problems of one file, in its order.

    Args:
      file: on this machine, whatever its name.
      published: says what its fields mean.
      name: as released, ending in .parquet or .jsonl; also for identities.

    Raises:
      ValueError: a row lacks a field or has a wrong value there; file, row and field are named.
    """
    for number, row in enumerate(_read(file, published, pathlib.PurePath(name).suffix)):
        try:
            yield _row(row, published, f"{name}:{number}")
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}, row {number}: {_words(error)}. It has the fields {sorted(row)}. Expected "
                f"the file of {published.homepage} at revision {published.revision}; for another "
                "release, change its entry in occ/tasks/datasets/published.py."
            ) from error


def _words(error: Exception) -> str:
    return str(error.args[0]) if error.args else str(error)


def _read(file: pathlib.Path, published: Published, suffix: str) -> Iterator[dict[str, Any]]:
    if suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as parquet:
            wanted = {path.split(".")[0] for path in _paths(published).values()}
            # Only columns that are needed and there: a missing one is told by `_value`.
            columns = [name for name in parquet.schema_arrow.names if name in wanted]
            if not columns:
                columns = parquet.schema_arrow.names
            for batch in parquet.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
                yield from batch.to_pylist()
    elif suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    else:
        raise ValueError(f"{file}: expected a .parquet or .jsonl file, got {suffix!r}.")


def _paths(published: Published) -> dict[str, str]:
    fields = ("problem", "answer", "context", "identity", "subject", "level")
    found = {name: getattr(published, name) for name in fields}
    return {name: path for name, path in found.items() if path is not None}


def _row(row: Mapping[str, Any], published: Published, default: str) -> Row:
    problem = published.read_problem(_text(row, published.problem))
    if published.context is not None:
        context = _optional(row, published.context)
        problem = f"{context}\n{problem}" if context else problem
    if not problem:
        raise ValueError(f"field {published.problem!r} is empty")
    answer = _value(row, published.answer)
    try:
        answer = published.read_answer(answer)
    except ValueError as error:
        raise ValueError(f"field {published.answer!r}: {_words(error)}") from error
    identity = default if published.identity is None else str(_value(row, published.identity))
    return Row(
        identity,
        problem,
        answer,
        _optional(row, published.subject),
        _optional(row, published.level),
    )


def _value(row: Any, path: str) -> Any:
    """What stands at a path such as "prompt.0.content"."""
    value = row
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            raise LookupError(f"expected a field {path!r}, there is no {part!r}") from None
    if value is None:
        raise LookupError(f"expected a field {path!r}, it is empty")
    return value


def _text(row: Any, path: str) -> str:
    value = _value(row, path)
    if not isinstance(value, str):
        raise TypeError(f"expected a text in field {path!r}, got {type(value).__name__}")
    return value


def _optional(row: Mapping[str, Any], path: str | None) -> str:
    """A text of a field that may be missing."""
    value = None if path is None else row.get(path)
    return "" if value is None else str(value).strip()


def sha256(file: pathlib.Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
