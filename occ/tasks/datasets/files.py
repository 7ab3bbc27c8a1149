"""Rows of released files, one at a time, and what a wrong one is told by."""

from __future__ import annotations

import codecs
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow.parquet

from occ import json_files
from occ.tasks.datasets.answers import counted
from occ.tasks.datasets.published import Published

ROWS_AT_A_TIME = 8192
FORMATS = (".parquet", ".jsonl")


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
      ValueError: the file is not of its format; a row lacks a field or has a wrong value there;
        file, row and field are named.
    """
    suffix = file.suffix if file.suffix in FORMATS else pathlib.PurePath(name).suffix
    for number, row in enumerate(_read(file, published, suffix)):
        try:
            if not isinstance(row, dict):
                raise TypeError(f"expected an object with fields, got {row!r:.80}")
            yield _row(row, published, f"{name}:{number}")
        except (LookupError, TypeError, ValueError) as error:
            fields = f" It has the fields {sorted(row)}." if isinstance(row, dict) else ""
            raise ValueError(
                f"{file}, row {number}: {_words(error)}.{fields} Expected the file of "
                f"{published.homepage} at revision {published.revision}; for another release, "
                "change its entry in occ/tasks/datasets/published.py."
            ) from error


def _words(error: Exception) -> str:
    return str(error.args[0]) if error.args else str(error)


def _read(file: pathlib.Path, published: Published, suffix: str) -> Iterator[Any]:
    if suffix not in FORMATS:
        raise ValueError(f"{file}: expected a .parquet or .jsonl file, got {suffix!r}.")
    if _begins_like_a_page(file):
        raise ValueError(
            f"{file}: expected a {suffix} file, got a web page. Download the file itself, "
            "not the page that shows it."
        )
    if suffix == ".jsonl":
        yield from _lines(file)
        return
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            wanted = {path.split(".")[0] for path in _paths(published)}
            # Only columns that are needed and there: a missing one is told by `_value`.
            columns = [name for name in parquet.schema_arrow.names if name in wanted]
            if not columns:
                columns = parquet.schema_arrow.names
            for batch in parquet.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file}: expected a parquet file, but it cannot be read ({error}). It may be cut off: "
            "download it again."
        ) from error


def _begins_like_a_page(file: pathlib.Path) -> bool:
    with file.open("rb") as source:
        start = source.read(64).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head"))


def _lines(file: pathlib.Path) -> Iterator[Any]:
    """The value of each line that is not blank."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield json_files.parse(line, f"{file}, line {number}")


def _paths(published: Published) -> list[str]:
    """Of all fields that are asked for, in any of the set's layouts."""
    names = ("problem", "answer", "context", "identity", "subject", "level", "several")
    paths = (getattr(layout, name) for layout in published.layouts for name in names)
    return [path for path in paths if path is not None]


def _layout(row: Mapping[str, Any], published: Published) -> Published:
    """The first of the set's layouts whose problem and answer a row has."""
    for layout in published.layouts:
        if {path.split(".")[0] for path in (layout.problem, layout.answer)} <= row.keys():
            return layout
    return published


def _row(row: Mapping[str, Any], published: Published, default: str) -> Row:
    published = _layout(row, published)
    problem = published.read_problem(_text(row, published.problem))
    if published.context is not None:
        context = _optional(row, published.context)
        problem = f"{context}\n{problem}" if context else problem
    if not problem:
        raise ValueError(f"field {published.problem!r} is empty")
    answer = _value(row, published.answer)
    try:
        answer = published.read_answer(answer)
        if published.several is not None:
            answer = counted(answer, row.get(published.several) is True)
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
