"""Paths on a command line, local or in a bucket."""

from __future__ import annotations

import pathlib
from typing import Annotated

import tyro

from occ.buckets import Path, path

PathArgument = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: path(words[0]),
        is_instance=lambda value: isinstance(value, pathlib.PurePath),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""Of a field that tyro fills: a path, or gs://BUCKET/FOLDER."""
