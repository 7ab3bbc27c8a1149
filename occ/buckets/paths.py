"""Local paths and those in a bucket, told apart by their type."""

from __future__ import annotations

import pathlib
import re
from typing import Any, TypeAlias

from occ.extras import require

Path: TypeAlias = Any
"""`pathlib.Path`, or `etils.epath.Path` for gs://: the same methods, without types of its own."""

_MANGLED = re.compile(r"[a-z][a-z0-9+.-]+:/")  # a drive of Windows has one letter


def path(text: str | pathlib.PurePath) -> Path:
    """A path of what somebody wrote: `pathlib.Path`, or `epath.Path` in a bucket.

    Args:
      text: a path, or "gs://BUCKET/FOLDER". What is a path already is returned as it is.

    Raises:
      ValueError: the address of something else; says what is expected.
      ImportError: the extra buckets is not installed.

    >>> path("runs/laptop")
    PosixPath('runs/laptop')
    """
    if isinstance(text, pathlib.PurePath) and not isinstance(text, pathlib.Path):
        return text
    words = str(text)
    if not _MANGLED.match(words):
        return pathlib.Path(text)
    if not re.match(r"gs://[^/]+/+[^/]", words):
        raise ValueError(
            f"path: expected a path or gs://BUCKET/FOLDER, got {words!r}. Other stores are not "
            "supported (Orbax renames folders there, copy by copy); mount the bucket, and give the "
            "path at which all hosts see it."
        )
    require("buckets", "a path in a bucket", "etils", "gcsfs")
    from occ.buckets import store

    store.use()
    return store.named(words.removeprefix("gs://").rstrip("/"))


def is_bucket(path: Path) -> bool:
    """Whether a path lies in a bucket."""
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """The path from the root; one in a bucket always is."""
    return path if is_bucket(path) else path.absolute()
