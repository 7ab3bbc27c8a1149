"""What a run begins with: weights of others, and what is learnt before RL."""

from __future__ import annotations

import dataclasses
from typing import Literal

from occ.checks import validate


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """Weights that were trained elsewhere.

    They must be of the very architecture that `TrainConfig.model` describes. Where they hold no MTP
    modules, `model.mtp.num_modules` fresh ones are attached.

    Attributes:
      path: a folder of safetensors files, a .gguf file, OWNER/NAME in huggingface_hub's cache, or
        "package:NAME" for the one .gguf file that an installed package holds ("package:NAME/FILE"
        for any).
      attach: what fresh modules begin as: "last_block" (a copy of the trunk's last) or "random".
    """

    path: str
    attach: Literal["last_block", "random"] = "last_block"

    def __post_init__(self):
        validate(self)


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised learning before RL.

    "demonstrations" teach a tiny model, all of it, so that RL has something to elicit.
    "own_samples" leave the trunk and the head as they are, and teach the MTP modules alone to
    predict what the model itself says to the task's prompts: fresh modules beside a model that
    was trained elsewhere.

    Attributes:
      steps: gradient steps; 0 begins RL at once.
      kind: what is learnt from.
      batch_size: responses a step.
      learning_rate: peak of a linear warm-up and cosine decay.
      clean_steps: of demonstrations, leading steps on right answers alone, from which the task is
        learnt faster.
      wrong_fraction: share of the later demonstrations that are wrong (a digit, or what the task
        says); the model then knows the answer (its mode) without often sampling it.
      mtp_weight: of demonstrations, weight of the MTP cross-entropy beside the next-token one,
        trained jointly as in DeepSeek-V3's pre-training (0.3).
      pool: own samples, drawn once since the model that they come from does not change; rounded
        up to whole rollouts, of which the last is kept for measuring.
    """

    steps: int = 0
    kind: Literal["demonstrations", "own_samples"] = "demonstrations"
    batch_size: int = 256
    learning_rate: float = 2e-3
    clean_steps: int = 0
    wrong_fraction: float = 0.6
    mtp_weight: float = 0.3
    pool: int = 2048

    def __post_init__(self):
        validate(self)

    @property
    def learns_modules(self) -> bool:
        """Whether the MTP modules alone are trained."""
        return self.kind == "own_samples" and self.steps > 0
