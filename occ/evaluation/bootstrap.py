"""Intervals over problems by the bootstrap, and a paired test between two runs.

A benchmark is a sample of the problems that it might have had, so its interval is over problems:
the samples of one problem are averaged first. Of several benchmarks each is resampled by itself,
and their mean is the mean of their means, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from occ.evaluation.intervals import Estimate

RESAMPLES = 9_999
_AT_A_TIME = 500  # resamples in memory


class Paired(NamedTuple):
    """A comparison of two runs on the same problems.

    Attributes:
      difference: mean of the differences, with its interval over problems.
      p_value: two-sided; how often signs at random give a difference at least as large.
    """

    difference: Estimate
    p_value: float


def bootstrap_interval(
    groups: Sequence[Float[np.ndarray, "_"]],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean over groups of their means, with the percentile bootstrap interval over problems.

    Args:
      groups: one array [problems] a benchmark; NaN, a problem that says nothing, is left out.
      confidence: of the interval.
      seed: of the resamples; equal calls give equal intervals.

    Returns:
      An estimate whose n is the number of problems. All NaN where a group has none; the interval is
      NaN where a group has one.

    Raises:
      ValueError: no groups.

    Reference: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    >>> bootstrap_interval([np.array([1.0, 1.0]), np.array([0.0, np.nan, 0.0])])
    Estimate(mean=0.5, low=0.5, high=0.5, n=4)
    """
    if not groups:
        raise ValueError("bootstrap_interval: expected at least one group of problems, got none.")
    kept = [np.asarray(group, np.float64)[~np.isnan(group)] for group in groups]
    n = sum(len(group) for group in kept)
    if not all(len(group) for group in kept):
        return Estimate(np.nan, np.nan, np.nan, n)
    mean = float(_mean_of_means(*kept))
    if any(len(group) < 2 for group in kept):
        return Estimate(mean, np.nan, np.nan, n)
    interval = scipy.stats.bootstrap(
        kept,
        _mean_of_means,
        n_resamples=RESAMPLES,
        batch=_AT_A_TIME,
        vectorized=True,
        paired=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), n)


def _mean_of_means(*groups: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(np.mean([group.mean(axis=axis) for group in groups], axis=0))


def paired_test(
    values: Sequence[Float[np.ndarray, "_"]],
    baseline: Sequence[Float[np.ndarray, "_"]],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """The difference of two runs, problem by problem, and whether it could be chance.

    The interval is the bootstrap's over problems. The test flips signs: were the runs equally good,
    each problem's difference would be as likely as its opposite.

    Args:
      values, baseline: one array [problems] a benchmark, of the same problems in the same order;
        a problem that is NaN in one is left out of both.
      confidence: of the interval.
      seed: of both.

    Raises:
      ValueError: other benchmarks or other numbers of problems in the two.

    Reference: Fisher, The Design of Experiments, 1935, section 21.
    """
    shapes = [[np.shape(group) for group in side] for side in (values, baseline)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "paired_test: expected the same problems in both, got benchmarks of shapes "
            f"{shapes[0]} and {shapes[1]}. Compare runs on the benchmarks that both have."
        )
    differences = [
        np.asarray(a, np.float64) - np.asarray(b, np.float64)
        for a, b in zip(values, baseline, strict=True)
    ]
    estimate = bootstrap_interval(differences, confidence=confidence, seed=seed)
    kept = [group[~np.isnan(group)] for group in differences]
    if not all(len(group) for group in kept):
        return Paired(estimate, np.nan)
    weighted = np.concatenate([group / len(group) for group in kept])
    if len(weighted) < 2:
        return Paired(estimate, 1.0)
    test = scipy.stats.permutation_test(
        (weighted,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_AT_A_TIME,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return Paired(estimate, float(test.pvalue))
