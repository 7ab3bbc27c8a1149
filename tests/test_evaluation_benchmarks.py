"""Bootstrap and paired test by known cases and planted differences; measures from completions."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from occ.evaluation import acceptance, benchmarks, bootstrap
from occ.evaluation.bootstrap import bootstrap_interval, paired_test
from occ.evaluation.outcomes import pass_at_k


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 999)


# -- bootstrap ------------------------------------------------------------------------------------


def test_the_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(0).random(400)
    estimate = bootstrap_interval([values])
    half = 1.96 * values.std() / np.sqrt(400)
    assert estimate.mean == values.mean() and estimate.n == 400
    assert estimate.half_width == pytest.approx(half, rel=0.1)


def test_the_interval_covers_as_often_as_it_says():
    """Skewed accuracies of 40 problems; the percentile bootstrap covers a little less than 95 %."""
    rng = np.random.default_rng(1)
    found = [bootstrap_interval([rng.beta(0.5, 1.0, 40)], seed=i) for i in range(200)]
    missed = np.mean([estimate.excludes(1 / 3) for estimate in found])
    assert 0.01 < missed < 0.11
    narrow = [estimate.mean - (estimate.mean - estimate.low) / 2 > 1 / 3 for estimate in found]
    assert np.mean(narrow) > 0.08  # half as wide would be found out


def test_benchmarks_count_alike_whatever_their_sizes():
    estimate = bootstrap_interval([np.ones(10), np.zeros(1000)])
    assert estimate[:3] == (0.5, 0.5, 0.5) and estimate.n == 1010
    rng = np.random.default_rng(0)
    small, large = rng.random(20), rng.random(500)
    spread = np.sqrt(small.var() / 20 + large.var() / 500) / 2
    assert bootstrap_interval([small, large]).half_width == pytest.approx(1.96 * spread, rel=0.15)


def test_equal_calls_give_equal_intervals():
    values = np.random.default_rng(0).random(30)
    assert bootstrap_interval([values]) == bootstrap_interval([values])
    assert bootstrap_interval([values]) != bootstrap_interval([values], seed=1)


def test_what_says_nothing_is_left_out():
    values = np.array([0.0, np.nan, 1.0])
    assert bootstrap_interval([values]) == bootstrap_interval([values[[0, 2]]])
    nothing = bootstrap_interval([values, np.array([np.nan])])
    assert np.isnan(nothing.mean) and np.isnan(nothing.low)
    one = bootstrap_interval([np.array([0.25])])
    assert one.mean == 0.25 and np.isnan(one.low) and not one.excludes(5.0)


# -- paired test ----------------------------------------------------------------------------------


def two_runs(gain, seed=0, problems=60):
    """Accuracies of equally hard problems, the second run better by `gain` on each."""
    rng = np.random.default_rng(seed)
    hard = rng.random(problems)
    runs = [np.clip(hard + shift + rng.normal(size=problems) * 0.05, 0, 1) for shift in (0, gain)]
    return [run[:20] for run in runs], [run[20:] for run in runs]


def test_a_planted_difference_is_found_that_intervals_apart_would_hide():
    (a, b), (c, d) = two_runs(0.08)
    found = paired_test([b, d], [a, c])
    assert found.p_value < 0.01 and found.difference.excludes(0.0)
    assert found.difference.mean == pytest.approx(0.08, abs=0.03)
    assert not bootstrap_interval([b, d]).excludes(bootstrap_interval([a, c]).mean)
    turned = paired_test([a, c], [b, d])
    assert turned.difference.mean == -found.difference.mean


def test_without_a_difference_p_values_are_uniform():
    values = []
    for seed in range(60):
        (a, b), (c, d) = two_runs(0.0, seed)
        values.append(paired_test([b, d], [a, c], seed=seed).p_value)
    assert scipy.stats.kstest(values, "uniform").pvalue > 0.01
    assert paired_test([a, c], [a, c]).p_value == 1.0


def test_few_problems_are_tested_exactly():
    """Of the 2^5 signs two give a sum as far out as all of one sign."""
    assert paired_test([np.ones(5)], [np.zeros(5)]).p_value == pytest.approx(2 / 32)


def test_the_test_weighs_benchmarks_as_their_average_does():
    """Six problems of one benchmark outweigh two hundred of another: 2 of 2^6 signs are as far."""
    gains = [np.ones(6), np.full(200, -0.02)]
    found = paired_test(gains, [np.zeros(6), np.zeros(200)])
    assert found.difference.mean == pytest.approx(0.49)
    assert found.p_value < 0.1


def test_pairs_are_left_out_together():
    found = paired_test([np.array([1.0, np.nan, 1.0, 0.5])], [np.array([0.0, 0.0, np.nan, 0.0])])
    assert found.difference.mean == 0.75 and found.difference.n == 2


def test_other_problems_are_no_pairs():
    with pytest.raises(ValueError, match="the same problems in both"):
        paired_test([np.ones(3)], [np.ones(4)])
    with pytest.raises(ValueError, match="at least one group"):
        bootstrap_interval([])


# -- benchmarks -----------------------------------------------------------------------------------


def rows(correct, answers=None):
    """Rows of a completions file: [problems][samples] of True, False or None."""
    return [
        {
            "problem": f"p{i}",
            "index": i,
            "sample": j,
            "answer": str(verdict) if answers is None else answers[i][j],
            "correct": verdict,
            "tokens": 10 + j,
            "finished": j > 0,
        }
        for i, group in enumerate(correct)
        for j, verdict in enumerate(group)
    ]


def test_measures_by_hand():
    found = benchmarks.result(
        "b", rows([[True, False, False, False], [True] * 4], [["1", "2", "2", "3"], ["1"] * 4])
    )
    assert found.accuracy.tolist() == [0.25, 1.0] and found.majority.tolist() == [0.0, 1.0]
    assert found.passed[2].tolist() == [0.5, 1.0] and list(found.passed) == [1, 2, 4]
    assert found.samples == 4 and found.invalid == 0
    assert found.tokens == 11.5 and found.finished == 0.75
    assert found.summary()["pass@4"]["mean"] == 1.0 and found.problems == ("p0", "p1")


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_without_invalid_samples_the_measures_are_the_known_ones(correct):
    found = benchmarks.result("b", rows(correct)[::-1])
    assert np.mean(found.accuracy) == pytest.approx(np.mean(correct))
    for k in (1, 2, 3):
        assert np.mean(found.passed[k]) == pytest.approx(pass_at_k(np.array(correct), k))


def test_invalid_samples_are_counted_and_never_wrong():
    found = benchmarks.result("b", rows([[True, None, None], [None] * 3, [False, True, None]]))
    assert found.invalid == 6
    np.testing.assert_array_equal(found.accuracy, [1.0, np.nan, 0.5])
    np.testing.assert_array_equal(found.passed[2], [np.nan, np.nan, 1.0])
    np.testing.assert_array_equal(found.majority, [1.0, np.nan, 0.0])
    assert found.summary()["avg@3"]["mean"] == 0.75 and found.summary()["avg@3"]["n"] == 2


def test_an_unfinished_file_has_no_result():
    with pytest.raises(ValueError, match=r"got \[1, 2\]. The file is not finished"):
        benchmarks.result("b", rows([[True, True], [True, True]])[:3])
    with pytest.raises(ValueError, match=r"got \[\]"):
        benchmarks.result("b", [])


def test_an_average_needs_all_its_benchmarks():
    found = {
        name: benchmarks.result(name, rows(correct))
        for name, correct in {"a": [[True], [True]], "b": [[False]] * 8, "c": [[None]]}.items()
    }
    assert benchmarks.average(found, ["a", "b"]).mean == 0.5
    for names in (["a", "d"], ["a", "c"], []):
        assert np.isnan(benchmarks.average(found, names).mean)


# -- acceptance -----------------------------------------------------------------------------------


def test_acceptance_by_module_and_position():
    """A response of three tokens after one of padding, and one of two; bins from 0 and from 2."""
    mask = np.array([[False, True, True, True], [True, True, False, False]])
    agrees = np.array(
        [
            [[True, True, False, True], [True, True, True, True]],
            [[True, False, False, True], [False, False, True, True]],
        ]
    )
    found = acceptance.count(agrees, mask, edges=(2,))
    assert found.tokens.tolist() == [4, 1]
    assert found.accepted.tolist() == [[3, 1], [0, 1]]
    twice = found.plus(found)
    assert acceptance.summary(twice, edges=(2,)) == [
        {"module": 1, "share": 0.8, "positions": {"0-1": 0.75, "2-": 1.0}},
        {"module": 2, "share": 0.2, "positions": {"0-1": 0.0, "2-": 1.0}},
    ]


def test_acceptance_without_modules():
    found = acceptance.count(np.zeros((0, 1, 3), bool), np.ones((1, 3), bool))
    assert found.accepted.shape == (0, 6) and acceptance.summary(found) == []
