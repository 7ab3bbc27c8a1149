"""What configurations check of their fields, and how they say so."""

from __future__ import annotations

from typing import Any


def one_of(owner: str, field: str, value: Any, allowed: tuple) -> None:
    """Raises a ValueError that names the field unless its value is allowed."""
    if value not in allowed:
        raise ValueError(f"{owner}.{field} must be one of {allowed}, got {value!r}.")


def positive(owner: str, **fields: int | float) -> None:
    """Raises a ValueError that names the first field that is not positive."""
    for field, value in fields.items():
        if not value > 0:
            raise ValueError(f"{owner}.{field} must be > 0, got {value}.")
