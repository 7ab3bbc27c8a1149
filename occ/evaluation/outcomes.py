"""avg@k, pass@k and maj@k from sampled outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


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
    return float(np.mean(pass_probability(np.full(len(correct), n), correct.sum(axis=1), k)))


def pass_probability(
    samples: Int[np.ndarray, "problems"], successes: Int[np.ndarray, "problems"], k: int
) -> Float[np.ndarray, "problems"]:
    """`pass_at_k` of each problem, where they have different numbers of samples.

    Args:
      samples: [problems], n of each.
      successes: [problems], c of each.
      k: at least 1.

    Returns:
      float64 [problems]; NaN where n < k, since there is no estimate without bias.

    >>> pass_probability(np.array([4, 2, 1]), np.array([1, 2, 0]), 2).tolist()
    [0.5, 1.0, nan]
    """
    terms = [np.maximum(samples - successes - i, 0) / np.maximum(samples - i, 1) for i in range(k)]
    return np.where(samples >= k, 1 - np.prod(np.stack(terms), axis=0), np.nan)


def maj_at_k(
    answers: Sequence[Sequence[str]], correct: Bool[np.ndarray, "problems samples"]
) -> float:
    """Share of problems whose most frequent answer is correct; of equals, the first given.

    Args:
      answers: [problems][samples] texts.
      correct: [problems, samples], whether each is correct.
    """
    wins = [majority(row, verdicts) for row, verdicts in zip(answers, correct, strict=True)]
    return float(np.mean(wins))


def majority(answers: Sequence[str | None], correct: Sequence[bool] | np.ndarray) -> bool:
    """Whether the most frequent answer is correct; of equals, the first given.

    Args:
      answers: of one problem's samples; None is a sample without an answer, which has no vote.
      correct: of each.

    Returns:
      False where no sample has an answer.

    >>> majority(["7", None, None, "8", "8"], [True, False, False, False, False])
    False
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return bool(correct[list(answers).index(winner)])
