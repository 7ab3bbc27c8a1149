"""How far MTP modules would draft for the main head: by module, and by position in the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

EDGES = (16, 64, 256, 1024, 4096)
"""Positions at which a new bin begins."""


class Acceptance(NamedTuple):
    """Counts over greedy responses, which add up over portions.

    Attributes:
      accepted: int [K, bins], tokens that module k's most likely token is, given the true prefix.
      tokens: int [bins], tokens of the responses; the same for all modules.
    """

    accepted: Int[np.ndarray, "modules bins"]
    tokens: Int[np.ndarray, "bins"]

    def plus(self, other: Acceptance) -> Acceptance:
        """Counts of both."""
        return Acceptance(self.accepted + other.accepted, self.tokens + other.tokens)


def count(
    agrees: Bool[np.ndarray, "modules batch time"],
    response_mask: Bool[np.ndarray, "batch time"],
    edges: Sequence[int] = EDGES,
) -> Acceptance:
    """Counts by position of the token in its response, from 0.

    For the first module this is what speculative decoding accepts of a draft of one token. A token
    that no module could have predicted, for want of a prefix, counts as not accepted.

    Args:
      agrees: whether the module's most likely token is the token that stands there.
      response_mask: tokens of the responses, which the main head found most likely.
      edges: positions at which a new bin begins, rising.
    """
    positions = np.cumsum(response_mask, axis=1) - 1
    bins = np.digitize(positions, edges)[response_mask]
    size = len(edges) + 1
    return Acceptance(
        np.stack(
            [np.bincount(bins[module[response_mask]], minlength=size) for module in agrees]
        ).reshape(len(agrees), size)
        if len(agrees)
        else np.zeros((0, size), np.int64),
        np.bincount(bins, minlength=size),
    )


def summary(counts: Acceptance, edges: Sequence[int] = EDGES) -> list[dict[str, Any]]:
    """As JSON: for each module its share in all, and in each bin that has tokens.

    >>> counts = Acceptance(np.array([[3, 1, 0]]), np.array([4, 2, 0]))
    >>> summary(counts, edges=(16, 64))
    [{'module': 1, 'share': 0.6666666666666666, 'positions': {'0-15': 0.75, '16-63': 0.5}}]
    """
    starts = [0, *edges]
    names = [f"{a}-{b - 1}" for a, b in zip(starts, edges, strict=False)] + [f"{starts[-1]}-"]
    total = int(counts.tokens.sum())
    return [
        {
            "module": module,
            "share": float(accepted.sum() / total) if total else float("nan"),
            "positions": {
                name: float(a / t)
                for name, a, t in zip(names, accepted, counts.tokens, strict=True)
                if t
            },
        }
        for module, accepted in enumerate(counts.accepted, start=1)
    ]
