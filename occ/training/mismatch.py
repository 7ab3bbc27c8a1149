"""How far the engine that samples is from the policy that is trained, token by token.

    r = log pi_old - log pi_rollout,   tokens ~ pi_rollout

Reference: Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from occ.generation.engines import MismatchError
from occ.training.batch import Minibatch
from occ.training.config import TrainConfig
from occ.training.metrics import declare

for _name, _meaning, _better in (
    ("mismatch/kl", "KL divergence of the trained policy from the engine's, nats a token (k3)", -1),
    ("mismatch/largest", "largest |log-prob there - log-prob here| of a token, nats", -1),
    ("mismatch/truncated", "share of the tokens whose importance weight is cut off", -1),
    ("mismatch/weight", "mean importance weight of a token after that; 1 without mismatch", 0),
    ("engine/weights_seconds", "the last hand-over of weights, with its comparison", -1),
    ("engine/weights_compared", "share of the weights that the engine holds that were compared", 1),
    ("engine/generate_seconds", "the last samples of the engine", -1),
    ("engine/waited_seconds", "that training waited for them", -1),
):
    declare(_name, _meaning, None, better=_better)


_OVERLAP = (
    " With engine.overlap the updates of a rollout are in it, too: they may be as large as that, "
    "where the learning rate is."
)


def metrics(batch: Minibatch, sampled: Any, config: TrainConfig) -> dict[str, float]:
    """What an external engine's log-probs are worth; nothing for the in-process one.

    Args:
      batch: with log-probs of the engine and of the policy, float32 [B, T].
      sampled: bool [B, T], tokens that were sampled.
      config: of the run.

    Raises:
      MismatchError: they are so far apart that it cannot be rounding.
    """
    if not config.engine.external:
        return {}
    mask = np.asarray(sampled)
    here = np.asarray(batch.old_log_prob, np.float64)[mask]
    there = np.asarray(batch.rollout_log_prob, np.float64)[mask]
    ratio = here - there
    mean = float(np.abs(ratio).mean())
    whole = config.rollout.top_p == 1 and config.rollout.top_k == 0
    if whole and not mean <= config.engine.largest_mismatch:
        raise MismatchError(
            f"the engine's log-probs are {mean:.3g} nats from those of the policy on average, "
            f"expected at most {config.engine.largest_mismatch} (engine.largest_mismatch): "
            "rounding does not make that. It holds other weights or computes another model: "
            "compare its config.json and dtype with the run's, and the vLLM version with the "
            "one that occ/generation/engines/vllm.py was written for."
            + _OVERLAP
            * config.engine.overlap
        )
    weight = np.exp(ratio)
    cap = np.inf if config.importance_cap is None else config.importance_cap
    return {
        "mismatch/kl": float((np.expm1(ratio) - ratio).mean()),
        "mismatch/largest": float(np.abs(ratio).max()),
        "mismatch/truncated": float((weight > cap).mean()),
        "mismatch/weight": float(np.minimum(weight, cap).mean()),
    }
