"""Rules in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import rules
from occ.measures import Measurement

KEY = jax.random.key(0)


def weigh(rule, gram=None, ratio=None, heads=1):
    gram = jnp.full((heads + 1, heads + 1), jnp.nan) if gram is None else jnp.asarray(gram)
    weights, _ = rule.update(Measurement(gram, ratio), rule.init(heads), KEY)
    return np.asarray(weights)


def test_optimal_is_scaled_correlation_over_perturbation():
    gram = [[4.0, 3.0], [3.0, 9.0]]
    np.testing.assert_allclose(weigh(rules.optimal(2.0), gram), [1.0, 2 * 3 / 9], rtol=1e-6)


def test_eps_counts_in_full_where_the_perturbation_is_as_small():
    gram = [[1.0, 1e-8], [1e-8, 1e-8]]
    np.testing.assert_allclose(weigh(rules.optimal(eps=1e-8), gram)[1], 0.5, rtol=1e-6)


def test_joint_solution_does_not_count_shared_directions_twice():
    """Two copies of one direction get half the coefficient each, where each alone gets all."""
    alone = weigh(rules.optimal(), [[1.0, 0.5], [0.5, 1.0]])[1]
    gram = [[1.0, 0.5, 0.5], [0.5, 1.0, 1.0], [0.5, 1.0, 1.0]]
    joint = weigh(rules.optimal(), gram, heads=2)[1:]
    np.testing.assert_allclose(joint, [alone / 2, alone / 2], rtol=1e-3)


def test_ridge_keeps_nearly_collinear_heads_from_large_opposite_weights():
    gram = np.array([[1.0, 0.5, 0.6], [0.5, 1.0, 0.9999], [0.6, 0.9999, 1.0]])
    without = weigh(rules.optimal(relative_ridge=0.0), gram, heads=2)[1:]
    ridged = weigh(rules.optimal(relative_ridge=0.1), gram, heads=2)[1:]
    assert np.abs(without).max() > 100
    assert np.abs(ridged).max() < 1.5


def test_orthogonal_heads_decouple():
    gram = [[1.0, 0.5, -0.2], [0.5, 2.0, 0.0], [-0.2, 0.0, 4.0]]
    got = weigh(rules.optimal(relative_ridge=0.0), gram, heads=2)
    np.testing.assert_allclose(got, [1.0, 0.25, -0.05], rtol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [(None, -2.0), (rules.NONNEGATIVE, 0.0), ((-0.5, 0.5), -0.5), ((-9.0, -3.0), -3.0)],
)
def test_bounds(bounds, expected):
    got = weigh(rules.optimal(bounds=bounds), [[1.0, -2.0], [-2.0, 1.0]])
    np.testing.assert_allclose(got[1], expected, rtol=1e-6)


def test_fixed_and_detach_do_not_look():
    np.testing.assert_allclose(weigh(rules.fixed(0.2), heads=3), [1, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(weigh(rules.fixed([0.1, 0.3]), heads=2), [1, 0.1, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(weigh(rules.detach(), heads=2), [1, 0, 0])
    assert rules.detach().name == "detach"


def test_optimal_takes_a_ratio():
    got = weigh(rules.optimal(0.1), ratio=jnp.array([2.0, 2.0]), heads=2)
    np.testing.assert_allclose(got, [1, 0.2, 0.2], rtol=1e-6)


def test_scale_may_be_traced():
    gram = jnp.array([[1.0, 1.0], [1.0, 2.0]])
    got = jax.jit(lambda s: rules.optimal(s).update(Measurement(gram), (), KEY)[0])(3.0)
    np.testing.assert_allclose(got, [1.0, 1.5], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="expected 1 or K=2 coefficients"):
        weigh(rules.fixed([0.1, 0.2, 0.3]), heads=2)
    with pytest.raises(ValueError, match="must be >= 0"):
        rules.optimal(eps=-1e-8)
    with pytest.raises(ValueError, match="low <= high"):
        rules.optimal(bounds=(1.0, 0.0))
