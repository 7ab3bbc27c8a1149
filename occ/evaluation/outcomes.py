"""avg@k, pass@k and maj@k from sampled outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool


def avg_at_k(correct: Bool[np.ndarray, "problems samples"]) -> float:
    """Share of all samples that are correct."""
    return float(np.mean(correct))


def pass_at_k(correct: Bool[np.ndarray, "problems samples"], k: int) -> float:
    """Probability that at least one of k samples is correct, without bias from n > k samples.

        1 - C(n - c, k) / C(n, k), averaged over problems; c of n samples are correct

    Args:
      correct: [problems, n].
      k: 1..n.

    Raises:
      ValueError: k outside 1..n.

    Reference: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374.

    >>> pass_at_k(np.array([[True, False, False, False]]), 2)
    0.5
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass_at_k: expected 1 <= k <= {n} samples a problem, got {k}.")
    wrong = n - correct.sum(axis=1)
    terms = np.stack([np.maximum(wrong - i, 0) / (n - i) for i in range(k)])
    return float(np.mean(1 - np.prod(terms, axis=0)))


def maj_at_k(
    answers: Sequence[Sequence[str]], correct: Bool[np.ndarray, "problems samples"]
) -> float:
    """Share of problems whose most frequent answer is correct; of equals, the first given.

    Args:
      answers: [problems][samples] texts.
      correct: [problems, samples], whether each is correct.
    """
    wins = []
    for row, verdicts in zip(answers, correct, strict=True):
        winner = Counter(row).most_common(1)[0][0]
        wins.append(bool(verdicts[list(row).index(winner)]))
    return float(np.mean(wins))
