"""What a run samples: its rollouts, and its evaluations on held-out prompts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from occ.checks import validate


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a rollout is sampled, judged and cut into minibatches.

    Attributes:
      prompts: prompts a rollout.
      samples: responses a prompt (the group).
      minibatches: gradient steps a rollout.
      temperature, top_p, top_k: of sampling; top_k = 0 is off.
      speculation: how drafts of the MTP modules are judged, where there are any
        (`LayoutConfig.draft_depth`): "common" changes no sample (but for
        rounding, which in bfloat16 shows); "rejection" keeps more drafts, and
        draws other samples of the same distribution with each depth.
      routing_replay: a mixture of experts is scored and trained with the experts that its tokens
        went to when they were sampled; routers still weigh them. MTP modules choose anew.
      dynamic_sampling: drop groups whose rewards, before the length penalty, do not vary from the
        losses (DAPO); they are counted either way.
      overlong_buffer: tokens before the length limit over which a penalty grows; 0 is off.
      overlong_penalty: its size at the limit.
      overlong_filter: leave responses that were cut off out of the losses.
    """

    prompts: int = 64
    samples: int = 8
    minibatches: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    speculation: Literal["common", "rejection"] = "common"
    routing_replay: bool = False
    dynamic_sampling: bool = False
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    overlong_filter: bool = False

    def __post_init__(self):
        validate(self)
        if self.prompts % self.minibatches:
            raise ValueError(
                f"RolloutConfig.prompts ({self.prompts}) must be a multiple of minibatches "
                f"({self.minibatches}), so that no group is cut."
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation during and after training.

    Attributes:
      every: rollouts between evaluations.
      prompts: held-out prompts, the first ones of the test set.
      samples: sampled responses a prompt (avg@k).
      temperature: of those samples, whatever the rollouts' is.
      top_p: nucleus of those samples; 1 is off.
    """

    every: int = 20
    prompts: int = 256
    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        validate(self)
