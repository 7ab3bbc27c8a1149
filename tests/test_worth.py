"""What an auxiliary gradient is worth: Gaussian gradients, where everything has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occ
from occ import measures, rules, theory
from occ.theory import SampledGram

pytestmark = pytest.mark.usefixtures("x64")

SIZE, L = 6, 0.7


def gaussian(heads=1, seed=0, batch=4.0):
    """Expected gradients [K+1, D], and C and N / B of gradients with Gaussian noise."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(heads + 1, SIZE)) + 0.5
    # Noise that all of them share in part: sample s has d_i = mean_i + sum_j mix_ij z_j.
    mix = rng.normal(size=(heads + 1, heads + 1)) + np.eye(heads + 1)
    C, N = mean @ mean.T, SIZE * mix @ mix.T
    return mean, mix, SampledGram(jnp.asarray(C + N / batch), jnp.asarray(C))


def ratio(w, sampled):
    """R(w)."""
    c, V = np.asarray(sampled.cross[0]), np.asarray(sampled.same)
    return max(w @ c, 0) ** 2 / (w @ V @ w)


@pytest.mark.parametrize("seed", range(4))
def test_worth_and_coefficient_in_closed_form(seed):
    _, _, sampled = gaussian(seed=seed)
    (c0, c1), V = np.asarray(sampled.cross[0]), np.asarray(sampled.same)
    rho = V[0, 1] / np.sqrt(V[0, 0] * V[1, 1])
    r = c1 / np.sqrt(V[1, 1]) / (c0 / np.sqrt(V[0, 0]))
    found = theory.worth(sampled)
    np.testing.assert_allclose(found.worth, 1 + (r - rho) ** 2 / (1 - rho**2), rtol=1e-12)
    coefficient = np.sqrt(V[0, 0] / V[1, 1]) * (r - rho) / (1 - rho * r)
    np.testing.assert_allclose(found.coefficients, [coefficient], rtol=1e-10)
    np.testing.assert_allclose(found.signal_to_noise, c0 / (V[0, 0] - c0), rtol=1e-12)


def test_an_auxiliary_gradient_of_nothing_has_no_coefficient():
    """The norms of a trunk whose heads have norms of their own: zero, and not NaN."""
    _, _, sampled = gaussian(2)
    keep = jnp.array([1.0, 1.0, 0.0])
    found = theory.worth(SampledGram(*(jnp.outer(keep, keep) * matrix for matrix in sampled)))
    alone = theory.worth(SampledGram(*(matrix[:2, :2] for matrix in sampled)))
    np.testing.assert_allclose(found.coefficients, [alone.coefficients[0], 0.0], rtol=1e-12)
    np.testing.assert_allclose(found.worth, alone.worth, rtol=1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_no_direction_has_a_larger_signal_to_noise(heads):
    _, _, sampled = gaussian(heads)
    found = theory.worth(sampled)
    main = np.eye(heads + 1)[0]
    best = np.concatenate([[1.0], found.coefficients]) / np.sign(
        sampled.cross[0] @ np.r_[1.0, found.coefficients]
    )
    np.testing.assert_allclose(ratio(best, sampled) / ratio(main, sampled), found.worth, rtol=1e-12)
    others = np.random.default_rng(1).normal(size=(2000, heads + 1))
    assert max(ratio(w, sampled) for w in others) <= ratio(best, sampled)
    assert theory.relative_gain(sampled, found.coefficients) == pytest.approx(found.worth - 1)
    fixed = np.full(heads, 0.2)
    expected = ratio(np.r_[1.0, fixed], sampled) / ratio(main, sampled) - 1
    np.testing.assert_allclose(theory.relative_gain(sampled, fixed), expected, rtol=1e-12)


def test_without_noise_an_auxiliary_is_worth_nothing():
    _, _, sampled = gaussian(2)
    found = theory.worth(SampledGram(sampled.cross, sampled.cross))
    np.testing.assert_allclose(found.worth, 1, rtol=1e-10)
    np.testing.assert_allclose(found.coefficients, 0, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2])
def test_it_is_the_expected_guarantee_with_every_weight_free(heads):
    """Beside the main gradient alone at its own best step size."""
    _, _, sampled = gaussian(heads)
    model = theory.sampled_lower_bound(sampled, smoothness=L)
    w = -np.linalg.solve(model.second_order, model.first_order)
    both = model.first_order @ w / 2
    alone = theory.main_improvement(model, step_size=theory.optimal_step_size(model))
    found = theory.worth(sampled)
    np.testing.assert_allclose(both / alone, found.worth, rtol=1e-12)
    np.testing.assert_allclose(w[1:] / w[0], found.coefficients, rtol=1e-10)


def test_a_larger_minibatch_of_the_main_gradient_alone_gains_as_much():
    _, _, sampled = gaussian(batch=0.05)  # noise rules, so that there is such a minibatch
    found = theory.worth(sampled)
    factor = theory.equivalent_batch(found)
    assert factor > found.worth > 1
    main = np.array([1.0, 0.0])
    larger = ratio(main, theory.at_batch_size(sampled, factor))
    np.testing.assert_allclose(larger / ratio(main, sampled), found.worth, rtol=1e-10)
    # Where all is noise it is the worth itself.
    _, _, noisy = gaussian(batch=1e-9)
    worth = theory.worth(noisy)
    np.testing.assert_allclose(theory.equivalent_batch(worth), worth.worth, rtol=1e-6)
    assert theory.equivalent_batch(worth._replace(signal_to_noise=jnp.asarray(1e9))) == np.inf


def test_beyond_the_critical_batch_noise_offers_less_than_half():
    _, _, sampled = gaussian(batch=4.0)
    C, N = np.asarray(sampled.cross), np.asarray(sampled.same - sampled.cross)
    factor = float(theory.critical_batch(sampled))
    np.testing.assert_allclose(np.linalg.det(factor * C + N), 2 * np.linalg.det(N), rtol=1e-9)
    worths = [float(theory.worth(theory.at_batch_size(sampled, f)).worth) for f in (1, 10, 100)]
    assert worths[0] > worths[1] > worths[2] > 1
    # In the end like 1 / B^2.
    tail = [theory.worth(theory.at_batch_size(sampled, f)).worth - 1 for f in (1e4, 1e5)]
    np.testing.assert_allclose(tail[0] / tail[1], 100, rtol=0.01)


def test_gaussian_minibatches_have_the_matrices_and_the_gain_that_it_says():
    mean, mix, exact = gaussian(batch=8)
    rng = np.random.default_rng(2)
    noise = np.einsum("ij,mrjd->imrd", mix, rng.normal(size=(4000, 8, 2, SIZE)))
    samples = mean[:, None, None] + noise  # [K+1, minibatches, samples, D]
    estimates = jax.vmap(theory.sampled_gram)(tuple(jnp.asarray(samples)))
    average = SampledGram(*(matrix.mean(0) for matrix in estimates))
    np.testing.assert_allclose(average.same, exact.same, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(average.cross, exact.cross, rtol=0.05, atol=0.05)
    # A quadratic objective of curvature L, stepped along both and along g alone, best lengths.
    found = theory.worth(exact)
    gradients = samples.mean(2)

    def best_gain(w):
        steps = np.einsum("i,imd->md", w, gradients)
        slope, bend = (steps @ mean[0]).mean(), L * (steps**2).sum(1).mean()
        return slope**2 / (2 * bend)

    gain = best_gain(np.r_[1.0, found.coefficients]) / best_gain(np.array([1.0, 0.0]))
    np.testing.assert_allclose(gain, found.worth, rtol=0.02)


@pytest.mark.parametrize("memory", [np.inf, 3.0])
def test_a_centred_auxiliary_is_a_control_variate(memory):
    """Beside simulated minibatches, each with an average of `memory` others taken off."""
    mean, mix, exact = gaussian(batch=2.0, seed=1)
    N = np.asarray(exact.same - exact.cross)
    found = theory.worth(theory.centred(exact, memory))
    kept = 1 if memory == np.inf else memory / (memory + 1)
    shared = kept * N[0, 1] ** 2 / (exact.same[0, 0] * N[1, 1])
    np.testing.assert_allclose(found.worth, 1 / (1 - shared), rtol=1e-12)

    rng = np.random.default_rng(4)
    noise = np.einsum("ij,mjd->imd", mix, rng.normal(size=(200_000, 2, SIZE))) / np.sqrt(2)
    g, m = mean[:, None] + noise
    past = mean[1]
    if memory < np.inf:
        drawn = rng.normal(size=(int(memory), len(m), 2, SIZE))
        past = past + np.einsum("j,nmjd->nmd", mix[1], drawn).mean(0) / np.sqrt(2)
    step = g + float(found.coefficients[0]) * (m - past)
    gain = (step @ mean[0]).mean() ** 2 / (step**2).sum(1).mean()
    alone = (g @ mean[0]).mean() ** 2 / (g**2).sum(1).mean()
    np.testing.assert_allclose(gain / alone, found.worth, rtol=0.01)


def test_norm_of_a_preconditioner_and_a_coefficient_a_group():
    rng = np.random.default_rng(3)
    parts = tuple(
        {"a": jnp.asarray(rng.normal(size=(5, 3))), "b": jnp.asarray(rng.normal(size=(5, 2, 2)))}
        for _ in range(2)
    )
    P = {"a": jnp.asarray(rng.uniform(1, 2, 3)), "b": jnp.asarray(rng.uniform(1, 2, (2, 2)))}
    mine = theory.sampled_gram(theory.scaled(parts, P)).same
    g, m = ({k: np.asarray(v).mean(0) for k, v in part.items()} for part in parts)
    expected = sum(np.sum(g[k] * np.asarray(P[k]) * m[k]) for k in P)
    np.testing.assert_allclose(mine[0, 1], expected, rtol=1e-12)

    groups = [theory.sampled_gram(tuple({k: part[k]} for part in parts)) for k in ("a", "b")]
    stacked = SampledGram(*(jnp.stack(matrices) for matrices in zip(*groups, strict=True)))
    masked = [
        {k: v if k == name else jnp.zeros_like(v) for k, v in parts[1].items()} for name in "ab"
    ]
    explicit = theory.sampled_gram((parts[0], *masked))
    for ours, theirs in zip(theory.by_group(stacked), explicit, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
    np.testing.assert_allclose(theory.by_group(stacked).same, explicit.same, atol=1e-12)


def test_no_signal_is_nan_and_another_number_of_coefficients_is_refused():
    sampled = SampledGram(2 * jnp.eye(2), -jnp.eye(2))
    assert np.isnan(theory.worth(sampled).worth)
    assert np.isnan(theory.relative_gain(sampled, 0.2))
    assert theory.relative_gain(SampledGram(jnp.eye(2), jnp.array([[1.0, -9], [-9, 1]])), 1) == -1
    with pytest.raises(ValueError, match=r"K=1 coefficients, got shape \(2,\)"):
        theory.relative_gain(sampled, jnp.zeros(2))


# ---------------------------------------------------------------------------------------------
# Estimated while training
# ---------------------------------------------------------------------------------------------


def stream(count, seed=0):
    """Minibatch gradients of `gaussian`, as trees of two leaves."""
    mean, mix, exact = gaussian(seed=3, batch=1.0)
    rng = np.random.default_rng(seed)
    values = mean[:, None] + np.einsum("ij,tjd->itd", mix, rng.normal(size=(count, 2, SIZE)))
    return values, exact


def as_tree(vector):
    return {"a": jnp.asarray(vector[:4].reshape(2, 2)), "b": jnp.asarray(vector[4:])}


@pytest.mark.parametrize("norm", ["euclidean", "preconditioned"])
def test_past_gradients_are_the_loops(norm):
    """Averages of past gradients with the fresh one, and both averages' corrections."""
    values, _ = stream(6)
    decay, smoothing, eps = 0.8, 0.6, 1e-8
    nu = np.random.default_rng(1).uniform(1, 2, SIZE)
    P = 1 / (np.sqrt(nu) + eps) if norm == "preconditioned" else np.ones(SIZE)
    measure = measures.past_gradients(decay, smoothing, norm=norm)
    state = measure.init(1, as_tree(values[0, 0]))
    past, c, V, weight_past, weight_c, weight_V = np.zeros((2, SIZE)), 0, 0, 0, 0, 0
    for t in range(values.shape[1]):
        g, m = values[:, t]
        evidence = {"gradients": (as_tree(g), as_tree(m)), "second_moment": as_tree(nu)}
        got, state = measure.update(measure.reduce(evidence, 1), state, None)
        if t:
            before = past / weight_past
            fresh = np.array([before[0] @ (P * g), (before[0] @ (P * m) + before[1] @ (P * g)) / 2])
            c, weight_c = smoothing * c + (1 - smoothing) * fresh, smoothing * weight_c + 0.4
        V = smoothing * V + (1 - smoothing) * (values[:, t] * P) @ values[:, t].T
        weight_V = smoothing * weight_V + (1 - smoothing)
        past = decay * past + (1 - decay) * values[:, t]
        weight_past = decay * weight_past + (1 - decay)
        expected = c / weight_c if t else np.zeros(2)
        np.testing.assert_allclose(got.signal, expected, rtol=1e-12)
        same = V / weight_V
        np.testing.assert_allclose(got.sampled_correlation, same[0, 1:], rtol=1e-12)
        np.testing.assert_allclose(got.gram[0, 1:], expected[1:], rtol=1e-12)
        np.testing.assert_allclose(jnp.diagonal(got.gram), np.diagonal(same), rtol=1e-12)


def test_the_rule_finds_the_coefficient_of_the_largest_signal_to_noise():
    """Through the transformation: from the prior, in steps, to what the theory says."""
    values, exact = stream(3000)
    lam = float(theory.worth(exact).coefficients[0])
    assert 0.1 < lam < 2
    tx = occ.calibrate(
        measures.past_gradients(0.98, 0.999),
        rules.signal_to_noise(0.2, 20.0, bounds=(0.0, 3.0), largest_change=0.02),
    )
    state = tx.init(as_tree(values[0, 0]))

    def step(state, gradients):
        g, m = (as_tree_traced(x) for x in gradients)
        _, state = tx.update(g, state, auxiliary=m)
        return state, state.weights[1]

    _, coefficients = jax.lax.scan(step, state, jnp.asarray(values.transpose(1, 0, 2)))
    assert coefficients[0] == pytest.approx(0.2)  # nothing is past
    assert np.max(np.abs(np.diff(coefficients))) <= 0.02 + 1e-6
    assert np.mean(coefficients[-500:]) == pytest.approx(lam, abs=0.1)


def as_tree_traced(vector):
    return {"a": vector[:4].reshape(2, 2), "b": vector[4:]}


def measured(c, V):
    gram = jnp.asarray(V, jnp.float64)
    c = jnp.asarray(c, jnp.float64)
    expected = gram.at[0, 1:].set(c[1:]).at[1:, 0].set(c[1:])
    return measures.Measurement(expected, None, gram[0, 1:], c)


def test_the_rule_weighs_prior_and_measurements_and_holds_what_it_cannot_measure():
    rule = rules.signal_to_noise(0.2, 3.0, bounds=(0.0, 0.5), largest_change=1.0)
    state = rule.init(1)
    sees = measured([1.0, 1.0], [[9.0, 0.0], [0.0, 9.0]])  # lambda 1
    weights, state = rule.update(sees, state, None)
    np.testing.assert_allclose(weights, [1, (1 * 1.0 + 3 * 0.2) / 4], rtol=1e-6)
    held, state = rule.update(sees._replace(signal=-sees.signal), state, None)
    np.testing.assert_allclose(held, weights)
    assert state.count == 1
    for _ in range(20):
        weights, state = rule.update(sees, state, None)
    assert weights[1] == 0.5  # its bound
    # A head without a gradient neither counts nor disturbs the other.
    two = measured([1.0, 1.0, 0.0], [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 0]])
    weights, _ = rule.update(two, rule.init(2), None)
    np.testing.assert_allclose(weights, [1, 0.4, 0], rtol=1e-6)


def test_rule_and_measure_must_fit():
    with pytest.raises(ValueError, match="needs inner products of expected gradients"):
        occ.calibrate(rule=rules.signal_to_noise())
    with pytest.raises(ValueError, match="averages over updates by itself"):
        measures.smoothed(measures.past_gradients())
    with pytest.raises(ValueError, match="prior within bounds"):
        rules.signal_to_noise(2.0)
    with pytest.raises(ValueError, match="norm must be"):
        measures.past_gradients(norm="adam")
