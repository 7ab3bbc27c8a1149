"""A model that was trained elsewhere, as it comes out of its files."""

from __future__ import annotations


class PretrainedWarning(UserWarning):
    """The model is not what its files promise, or was changed on the way."""
