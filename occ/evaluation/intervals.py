"""Means with 95 % intervals, over seeds and over problems."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats


class Estimate(NamedTuple):
    """A mean and its interval.

    Attributes:
      mean: of the observations.
      low, high: the ends of the interval; NaN where one observation says nothing of the spread.
      n: observations.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of a value."""
        return bool(self.low > value or self.high < value)


def mean_interval(values: np.ndarray | list[float], confidence: float = 0.95) -> Estimate:
    """Mean and Student-t interval over independent repeats (seeds).

    Args:
      values: [n] observations.
      confidence: of the interval.

    Raises:
      ValueError: no observation.

    >>> estimate = mean_interval([1.0, 2.0, 3.0])
    >>> estimate.mean, round(estimate.half_width, 3)
    (2.0, 2.484)
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"mean_interval: expected [n >= 1] values, got shape {values.shape}.")
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Estimate(mean, np.nan, np.nan, 1)
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    half = float(quantile * values.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def ratio_interval(values: np.ndarray | list[float], base: np.ndarray | list[float]) -> Estimate:
    """Geometric mean of ratios within rounds, with the Student-t interval of their logarithms.

    Args:
      values: [n] positive measurements.
      base: [n], of the same rounds.

    >>> estimate = ratio_interval([2.0, 4.0], [1.0, 2.0])
    >>> round(estimate.mean, 6), round(estimate.high, 6)
    (2.0, 2.0)
    """
    logarithm = mean_interval(np.log(np.asarray(values) / np.asarray(base)))
    mean, low, high = np.exp([logarithm.mean, logarithm.low, logarithm.high]).tolist()
    return Estimate(mean, low, high, logarithm.n)


def paired_difference(
    values: np.ndarray | list[float], baseline: np.ndarray | list[float], confidence: float = 0.95
) -> Estimate:
    """Mean difference of two runs a seed, with its interval over seeds.

    Runs with the same seed see the same prompts and start from the same weights, so that part of
    the spread cancels.

    Raises:
      ValueError: the two have different lengths.
    """
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if values.shape != baseline.shape:
        raise ValueError(
            f"paired_difference: expected one value a seed in each, got shapes {values.shape} and "
            f"{baseline.shape}."
        )
    return mean_interval(values - baseline, confidence)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval, which is sound near 0 and 1 too.

    Raises:
      ValueError: no trial.

    Reference: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if trials < 1:
        raise ValueError("wilson_interval: expected at least one trial, got 0.")
    z = scipy.stats.norm.ppf((1 + confidence) / 2)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    half = z * spread / (1 + z**2 / trials)
    return Estimate(share, float(centre - half), float(centre + half), trials)
