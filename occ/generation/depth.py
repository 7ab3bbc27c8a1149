"""How deep to draft: what is kept of drafts, and what a step with them takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

PROBE_EVERY = 24
"""Rollouts without drafts after which one has them, to see whether they have become worth it."""
LEAST_GAIN = 1.05
"""Times as many tokens a second that drafts must promise: rows wait for the one with least luck."""
NEWEST = 0.3
"""Weight of the newest rollout in the moving averages of acceptance."""


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Tokens that a pass of the trunk decides, with drafts as deep as there are shares.

        1 + sum_d prod_{j <= d} acceptance_j

    Args:
      acceptance: of each depth, the share of drafts kept of those whose predecessors were.

    >>> expected_tokens([0.5, 0.5])
    1.75
    """
    return 1.0 + sum(math.prod(acceptance[:depth]) for depth in range(1, len(acceptance) + 1))


def best_depth(acceptance: Sequence[float], seconds: Sequence[float]) -> int:
    """The depth at which most tokens are decided in a second; 0 is no drafts.

    Drafts that promise less than `LEAST_GAIN` are left: 64 rows of equal length took 1.2 times as
    long with drafts that promised 1.006.

    Args:
      acceptance: of depths 1 to D, as of `expected_tokens`.
      seconds: of a step with 0 to D drafts.

    >>> best_depth([0.8, 0.7, 0.1], [1.0, 1.2, 1.4, 1.6])
    2
    >>> best_depth([0.1, 0.1, 0.1], [1.0, 1.2, 1.4, 1.6])
    0
    >>> best_depth([0.22], [1.0, 1.2])
    0
    """
    rates = [expected_tokens(acceptance[:d]) / taken for d, taken in enumerate(seconds)]
    best = max(range(len(rates)), key=rates.__getitem__)
    return best if rates[best] >= LEAST_GAIN * rates[0] else 0


@dataclasses.dataclass(frozen=True)
class DraftDepth:
    """What a run knows of its drafts, and so how deep the next rollout's go.

    The clock is asked once, and its answer kept with the run: what follows depends on the
    acceptance alone, which is the same however often a run is stopped.

    Attributes:
      seconds: of a step with 0 to D drafts; () where nothing was measured.
      acceptance: of depths 1 to D, moving averages over rollouts.
      undrafted: rollouts in a row without drafts.
    """

    seconds: tuple[float, ...] = ()
    acceptance: tuple[float, ...] = ()
    undrafted: int = 0

    @property
    def best(self) -> int:
        """Drafts for the next rollout.

        >>> DraftDepth((1.0, 1.2, 1.4), (0.8, 0.7)).best
        2
        >>> DraftDepth((1.0, 1.2, 1.4), (0.1, 0.1), undrafted=PROBE_EVERY).best
        1
        """
        depth = best_depth(self.acceptance, self.seconds) if self.seconds else 0
        return 1 if self.seconds and not depth and self.undrafted >= PROBE_EVERY else depth

    @property
    def step_share(self) -> float:
        """Of the time of a step with the drafts that are best, the share that they cost."""
        return 1 - self.seconds[0] / self.seconds[self.best] if self.seconds else 0.0

    def after(self, acceptance: Sequence[float]) -> DraftDepth:
        """With what a rollout measured, of the depths that it had; deeper ones move along.

        >>> DraftDepth((1.0, 1.0, 1.0), (0.5, 0.5)).after([1.0]).acceptance
        (0.65, 0.65)

        Deeper ones of which none was kept yet count as the last one here, so that they are tried.

        >>> DraftDepth((1.0, 1.0, 1.0), (0.0, 0.0)).after([1.0]).acceptance
        (0.3, 0.3)

        A run whose depth is given chooses none, and remembers nothing.

        >>> DraftDepth().after([1.0]) == DraftDepth()
        True
        """
        if not self.seconds:
            return self
        if not acceptance:
            return dataclasses.replace(self, undrafted=self.undrafted + 1)
        old = self.acceptance
        new = [a + NEWEST * (b - a) for a, b in zip(old, acceptance, strict=False)]
        before, last = old[len(new) - 1], new[-1]
        deeper = [min(1.0, last * a / before) if a and before else last for a in old[len(new) :]]
        return dataclasses.replace(self, acceptance=(*new, *deeper), undrafted=0)
