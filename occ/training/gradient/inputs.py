"""What one train step reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from occ.models.parameters import Parts, partition
from occ.models.policy import Policy
from occ.training.batch import Minibatch, take_rows
from occ.training.config import TrainConfig
from occ.training.gradient.stages import Stages


class StepInputs(NamedTuple):
    """What one train step reads.

    Attributes:
      stages: the model on the minibatch.
      parts: its parameters, by stage.
      config: the run's configuration.
      second_moment: Adam's estimate of the squared gradient, like the parameters, for measures
        that read it; None where there is none.
    """

    stages: Stages
    parts: Parts
    config: TrainConfig
    second_moment: Any = None

    @property
    def batch(self) -> Minibatch:
        """The minibatch."""
        return self.stages.batch

    @property
    def num_modules(self) -> int:
        """K."""
        return self.config.model.mtp.num_modules

    def on(self, batch: Minibatch) -> StepInputs:
        """The same model on another batch."""
        return self._replace(stages=self.stages.on(batch))

    def rows(self, rows: slice) -> StepInputs:
        """The same on some rows of the minibatch."""
        return self.on(take_rows(self.batch, rows))


def step_inputs(
    policy: Policy,
    batch: Minibatch,
    config: TrainConfig,
    *,
    prompt_columns: int = 0,
    second_moment: Any = None,
) -> StepInputs:
    """A policy on a minibatch.

    Args:
      policy: the model.
      batch: the minibatch.
      config: of the run.
      prompt_columns: leading columns without a response token; the output head leaves them out.
      second_moment: Adam's, for measures that read it.
    """
    stages = Stages(
        policy,
        batch,
        config.rollout.temperature,
        config.layout.logits_chunk,
        prompt_columns,
    )
    stages = stages.with_frozen_head()
    return StepInputs(stages, partition(policy.params), config, second_moment)
