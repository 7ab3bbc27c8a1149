"""The command line of a study: one subcommand a dataclass."""

from __future__ import annotations

import functools
import operator
from typing import Annotated, Any

import tyro


def command_line(description: str | None, *commands: type) -> Any:
    """Reads `run --seeds 0 1`, for one, into an instance of the class `Run`."""
    kinds = [Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())] for kind in commands]
    return tyro.cli(functools.reduce(operator.or_, kinds), description=description)  # type: ignore[call-overload]
