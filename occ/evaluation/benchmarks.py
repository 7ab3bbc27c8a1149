"""What a run achieved on a benchmark, from its sampled completions.

A sample whose answer could not be judged is no wrong answer: it is counted, and left out of every
measure. A problem without any judged sample is left out whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from occ.evaluation.bootstrap import bootstrap_interval
from occ.evaluation.intervals import Estimate
from occ.evaluation.outcomes import majority, pass_probability

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """One run on one benchmark; the arrays have an entry a problem, NaN where nothing was judged.

    Attributes:
      name: of the benchmark.
      problems: their identities.
      samples: k, responses a problem.
      invalid: of all samples, those that could not be judged.
      finished: share of the samples that ended by themselves, before the limit of tokens.
      tokens: mean length of a response, tokens.
      accuracy: avg@k.
      passed: pass@j for some j <= k.
      majority: 1 where maj@k is right.
    """

    name: str
    problems: tuple[str, ...]
    samples: int
    invalid: int
    finished: float
    tokens: float
    accuracy: Float[np.ndarray, "problems"]
    passed: dict[int, Float[np.ndarray, "problems"]]
    majority: Float[np.ndarray, "problems"]

    def summary(self) -> dict[str, Any]:
        """As JSON: every measure as mean, low, high over problems, and n."""

        def interval(values: np.ndarray) -> dict[str, float]:
            return bootstrap_interval([values])._asdict()

        return {
            "problems": len(self.problems),
            "samples": self.samples,
            "invalid": self.invalid,
            "finished": self.finished,
            "tokens": self.tokens,
            f"avg@{self.samples}": interval(self.accuracy),
            **{f"pass@{k}": interval(values) for k, values in self.passed.items()},
            f"maj@{self.samples}": interval(self.majority),
        }


def result(name: str, rows: Rows) -> Result:
    """Measures of one benchmark.

    Args:
      name: of the benchmark.
      rows: of its completions file, in any order: "problem" (identity), "index" (its place),
        "sample", "answer" (None without one), "correct" (None if it could not be judged),
        "tokens", "finished".

    Raises:
      ValueError: no rows, or not as many samples of one problem as of another.
    """
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["index"], row["sample"])):
        grouped.setdefault(row["index"], []).append(row)
    sizes = {len(group) for group in grouped.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"benchmarks.result: expected as many samples of each problem of {name!r}, got "
            f"{sorted(sizes)}. The file is not finished: run the evaluation again, it goes on."
        )
    [k] = sizes
    judged = [[row for row in group if row["correct"] is not None] for group in grouped.values()]
    n = np.array([len(group) for group in judged])
    successes = np.array([sum(row["correct"] for row in group) for group in judged])
    return Result(
        name=name,
        problems=tuple(str(group[0]["problem"]) for group in grouped.values()),
        samples=k,
        invalid=int(k * len(judged) - n.sum()),
        finished=float(np.mean([row["finished"] for row in rows])),
        tokens=float(np.mean([row["tokens"] for row in rows])),
        accuracy=np.where(n > 0, successes / np.maximum(n, 1), np.nan),
        passed={j: pass_probability(n, successes, j) for j in _powers(k)},
        majority=np.array([_majority(group) for group in judged], np.float64),
    )


def _powers(k: int) -> list[int]:
    """Powers of two below k, and k."""
    return [*(2**i for i in range(k.bit_length()) if 2**i < k), k]


def _majority(group: Rows) -> float:
    if not group:
        return np.nan
    return float(majority([row["answer"] for row in group], [row["correct"] for row in group]))


def average(results: Mapping[str, Result], names: Sequence[str]) -> Estimate:
    """Mean of avg@k over benchmarks, each with the same weight, with its interval over problems.

    Args:
      results: of one run, by benchmark.
      names: benchmarks of the average.

    Returns:
      NaN where one of them is missing or has no judged sample: an average over others would be
      compared with it.
    """
    if not names or any(name not in results for name in names):
        return Estimate(np.nan, np.nan, np.nan, 0)
    return bootstrap_interval([results[name].accuracy for name in names])
