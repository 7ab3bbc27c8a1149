"""What is measured of a rollout; `metrics.py` says what each name means."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from occ.generation.sampling import Work


def of_samples(batch, sampled, rewards, valid, kept) -> dict[str, float]:
    """Of a rollout's minibatch, its `Generation`, and bool [B] and [prompts] of what counts."""
    mask = np.asarray(sampled.response_mask)
    mismatch = np.abs(np.asarray(batch.old_log_prob) - np.asarray(batch.rollout_log_prob))
    return {
        "reward": float(rewards[valid].mean()) if valid.any() else math.nan,
        "rollout/invalid": float(1 - valid.mean()),
        "rollout/zero_variance_groups": float(1 - np.asarray(kept).mean()),
        "rollout/response_length": float(np.asarray(sampled.lengths).mean()),
        "rollout/finished": float(np.asarray(sampled.finished).mean()),
        "rollout/log_prob_mismatch": float(mismatch[mask].mean()),
    }


def of_drafts(work: Work, tokens: Any, step: int) -> dict[str, Any]:
    """How the drafts fared; nothing without any. Warns where not one was kept."""
    judged, kept = np.asarray(work.judged), np.asarray(work.kept)
    if not judged.size:
        return {}
    refused = bool(judged[0] > 0 and not kept[0])
    if refused:
        warnings.warn(
            f"All {judged[0]} drafts of the MTP modules were refused (rollout {step}). Their "
            "weights are stale or untrained: check that the modules are trained and that "
            "generation has the policy's newest parameters, or set layout.draft_depth=0.",
            RuntimeWarning,
            stacklevel=3,
        )
    return {
        "rollout/acceptance": list(work.acceptance),
        "rollout/tokens_a_pass": float(np.asarray(tokens).sum() / max(int(work.passes), 1)),
        "alarm/drafts_refused": int(refused),
    }
