"""What a run remembers beside its `TrainState`; saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from occ.generation.depth import DraftDepth


@dataclasses.dataclass(frozen=True)
class History:
    """The past of a run, as far as its future depends on it.

    Prompts and random keys are functions of the seed and the rollout's number, and a checkpoint
    is numbered by its finished rollouts: that number is the state of the data order and of
    sampling, so neither is stored.

    Attributes:
      bad_updates: updates in a row, up to now, that were skipped for a non-finite loss or gradient.
      last_bad_update: the words for the last one.
      best_rollout: finished rollouts when sampled accuracy was highest; None before an evaluation.
      best_sampled: that accuracy, avg@k in [0, 1].
      seconds: wall-clock time spent on this run, in all the processes that worked on it.
      drafts: how deep rollouts draft, of layout.draft_depth="auto".
    """

    bad_updates: int = 0
    last_bad_update: str = ""
    best_rollout: int | None = None
    best_sampled: float | None = None
    seconds: float = 0.0
    drafts: DraftDepth = dataclasses.field(default_factory=DraftDepth)

    @classmethod
    def read(cls, record: dict[str, Any]) -> History:
        """From what `dataclasses.asdict` made of it, by way of JSON."""
        found = record["drafts"]
        seconds, acceptance = tuple(found["seconds"]), tuple(found["acceptance"])
        drafts = DraftDepth(seconds, acceptance, found["undrafted"])
        return cls(**{**record, "drafts": drafts})

    def trained(self, row: dict[str, Any], bad_updates: int, last_bad_update: str) -> History:
        """After a rollout that left a row of metrics; the rest as of the attributes."""
        return dataclasses.replace(
            self,
            bad_updates=bad_updates,
            last_bad_update=last_bad_update,
            drafts=self.drafts.after(row.get("rollout/acceptance", ())),
        )

    def evaluated(self, rollout: int, sampled: float) -> History:
        """With the accuracy after `rollout` finished rollouts; of equal ones the first is best."""
        best = -math.inf if self.best_sampled is None else self.best_sampled
        if not sampled > best:  # nor if it is NaN, when no response could be judged
            return self
        return dataclasses.replace(self, best_rollout=rollout, best_sampled=sampled)
