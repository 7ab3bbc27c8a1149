"""Intervals by tables and coverage; pass@k by enumeration."""

import itertools

import numpy as np
import pytest

from occ.evaluation.intervals import mean_interval, paired_difference, wilson_interval
from occ.evaluation.outcomes import (
    avg_at_k,
    maj_at_k,
    majority,
    pass_at_k,
    pass_probability,
)


def test_t_interval_by_the_table():
    """n = 4, standard deviation 2, t(0.975, 3) = 3.182."""
    estimate = mean_interval([0.0, 0.0, 2 * np.sqrt(3), 2 * np.sqrt(3)])
    assert estimate.mean == pytest.approx(np.sqrt(3)) and estimate.n == 4
    assert estimate.half_width == pytest.approx(3.182 * 2 / 2, abs=1e-3)


def test_t_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [not mean_interval(rng.normal(size=3)).excludes(0.0) for _ in range(2000)]
    assert abs(np.mean(covered) - 0.95) < 0.015  # three standard errors


def test_one_seed_has_no_interval():
    estimate = mean_interval([0.5])
    assert estimate.mean == 0.5 and np.isnan(estimate.low) and not estimate.excludes(9.0)


def test_pairing_removes_what_the_seeds_share():
    seeds = np.array([0.1, 0.5, 0.9])
    difference = paired_difference(seeds + np.array([0.01, 0.02, 0.03]), seeds)
    assert difference.mean == pytest.approx(0.02) and difference.half_width < 0.03
    assert mean_interval(seeds).half_width > 0.5


def test_wilson_by_hand():
    """10 of 10: centre (1 + z^2 / 20) / (1 + z^2 / 10), upper end exactly 1."""
    estimate = wilson_interval(10, 10)
    assert estimate.high == pytest.approx(1.0)
    assert estimate.low == pytest.approx(10 / (10 + 1.959964**2), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "expected \\[n >= 1\\]"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "one value a seed"),
        (lambda: wilson_interval(0, 0), "at least one trial"),
        (lambda: pass_at_k(np.ones((1, 2), bool), 3), "1 <= k <= 2"),
    ],
)
def test_intervals_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(k):
    correct = np.random.default_rng(0).random((7, 5)) < 0.4
    shares = [
        np.mean([row[list(subset)].any() for subset in itertools.combinations(range(5), k)])
        for row in correct
    ]
    assert pass_at_k(correct, k) == pytest.approx(np.mean(shares))
    assert pass_at_k(correct, 1) == pytest.approx(avg_at_k(correct))


def test_majority_and_ties():
    answers = [["7", "8", "7"], ["1", "2", "3"], ["5", "6", "6"]]
    correct = np.array([[True, False, True], [False, True, False], [True, False, False]])
    assert maj_at_k(answers, correct) == pytest.approx(1 / 3)


def test_samples_without_an_answer_have_no_vote():
    assert majority([None, None, "7"], [False, False, True])
    assert not majority([None], [False]) and not majority([], [])


def test_pass_probability_with_different_numbers_of_samples():
    found = pass_probability(np.array([5, 3, 2]), np.array([2, 0, 2]), 3)
    assert found[0] == pytest.approx(pass_at_k(np.array([[True] * 2 + [False] * 3]), 3))
    assert found[1] == 0 and np.isnan(found[2])
