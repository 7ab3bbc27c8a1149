"""The decomposition on quadratics, where it is exact: numpy on dense matrices is the reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from occ import measures, rules, theory
from occ.models.parameters import is_shared, partition
from occ.training.config import MTPTrainingConfig
from occ.training.gradient.losses import mtp_loss, rl_loss
from occ.training.gradient.stages import Stages
from tests import tiny

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = {"a": (2, 3), "b": (4,)}
SIZE = 10
ETA, L = 0.3, 0.8


def vectors(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, SIZE))


def tree(vector):
    return {"a": jnp.asarray(vector[:6].reshape(2, 3)), "b": jnp.asarray(vector[6:])}


def trees(matrix):
    return tuple(tree(row) for row in matrix)


def flat(t):
    return np.asarray(ravel_pytree(t)[0])


def hessian(kind, seed=0, smoothness=L):
    """Symmetric, of spectral norm L."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, SIZE) if kind == "indefinite" else rng.uniform(-1, 0, SIZE)
    basis = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    return basis @ np.diag(smoothness * values / np.abs(values).max()) @ basis.T


def quadratic(gradient, H):
    """J with this gradient at 0, to be increased; its value there is no round number."""
    b, matrix = jnp.asarray(gradient), jnp.asarray(H)

    def objective(params):
        x = ravel_pytree(params)[0]
        return 0.7 + jnp.dot(b, x) + jnp.dot(x, matrix @ x) / 2

    return objective


def gram_of(directions):
    return directions @ directions.T


def zeros(t):
    return jax.tree.map(jnp.zeros_like, t)


def bound_of_step(gradient, step, smoothness=L):
    """The guarantee, from the step itself."""
    return gradient @ step - smoothness / 2 * step @ step


def equal(actual, expected, rtol=1e-12):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol)


# ---------------------------------------------------------------------------------------------
# The lower bound
# ---------------------------------------------------------------------------------------------


def test_terms_are_the_papers():
    g, m = vectors(2)
    c, v2, lam = g @ m, m @ m, 0.7
    model = theory.lower_bound(gram_of(np.stack([g, m])), smoothness=L)
    got = theory.contribution(model, lam, step_size=ETA)
    equal(got.correlation, ETA * lam * (1 - L * ETA) * c)
    equal(got.perturbation, L * ETA**2 * lam**2 / 2 * v2)
    equal(got.total, got.correlation - got.perturbation)
    equal(theory.optimal_coefficients(model, step_size=ETA), [(1 - L * ETA) / (L * ETA) * c / v2])
    equal(
        theory.optimal_contribution(model, step_size=ETA), (1 - L * ETA) ** 2 * c**2 / (2 * L * v2)
    )
    equal(theory.main_improvement(model, step_size=ETA), ETA * (1 - L * ETA / 2) * g @ g)
    equal(theory.optimal_step_size(model), 1 / L)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("relative_step", [0.01, 0.5, 1.0, 1.7])
def test_contribution_is_the_bound_with_minus_the_bound_without(heads, relative_step):
    """Also past the best step size, where the correlation counts against the step."""
    eta = relative_step / L
    g, *m = vectors(heads + 1)
    weights = np.random.default_rng(1).normal(size=(5, heads))
    model = theory.lower_bound(gram_of(np.stack([g, *m])), smoothness=L)
    alone = bound_of_step(g, eta * g)
    expected = [bound_of_step(g, eta * (g + w @ np.stack(m))) - alone for w in weights]
    equal(theory.contribution(model, weights, step_size=eta).total, expected, rtol=1e-11)
    equal(theory.main_improvement(model, step_size=eta), alone)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_optimum_agrees_with_brute_force(heads):
    """No coefficient of a fine grid beats it, on any axis and along random directions."""
    directions = vectors(heads + 1)
    model = theory.lower_bound(gram_of(directions), smoothness=L)
    best = np.asarray(theory.optimal_coefficients(model, step_size=ETA))
    top = float(theory.optimal_contribution(model, step_size=ETA))
    equal(theory.contribution(model, best, step_size=ETA).total, top)
    rays = np.concatenate([np.eye(heads), np.random.default_rng(2).normal(size=(4, heads))])
    grid = np.linspace(-2, 2, 4001)  # 0 among them
    for ray in rays:
        values = theory.contribution(model, best + grid[:, None] * ray, step_size=ETA).total
        assert np.argmax(values) == 2000
        assert values.max() == pytest.approx(top, rel=1e-12)
        bend = np.sum(np.square(ray @ directions[1:]))
        gap = L * ETA**2 / 2 * grid**2 * bend
        np.testing.assert_allclose(top - values, gap, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("heads", [1, 3])
def test_rule_with_this_scale_is_optimal(heads):
    """`rules.optimal` holds the same formula, with the smoothness constants in its scale."""
    gram = jnp.asarray(gram_of(vectors(heads + 1)))
    rule = rules.optimal(theory.coefficient_scale(ETA, L), eps=0.0, relative_ridge=0.0)
    weights, _ = rule.update(measures.Measurement(gram), (), jax.random.key(0))
    model = theory.lower_bound(gram, smoothness=L)
    equal(weights[1:], theory.optimal_coefficients(model, step_size=ETA))


def test_repeated_and_zero_heads_get_the_least_norm_solution():
    g, m = vectors(2)
    alone = theory.lower_bound(gram_of(np.stack([g, m])), smoothness=L)
    several = theory.lower_bound(gram_of(np.stack([g, m, m, 0 * m])), smoothness=L)
    single = float(theory.optimal_coefficients(alone, step_size=ETA)[0])
    got = theory.optimal_coefficients(several, step_size=ETA)
    np.testing.assert_allclose(got, [single / 2, single / 2, 0], rtol=1e-12, atol=1e-15)
    equal(
        theory.optimal_contribution(several, step_size=ETA),
        theory.optimal_contribution(alone, step_size=ETA),
    )
    zero = theory.lower_bound(gram_of(np.stack([g, 0 * m])), smoothness=L)
    np.testing.assert_array_equal(theory.optimal_coefficients(zero, step_size=ETA), [0.0])
    assert float(theory.optimal_contribution(zero, step_size=ETA)) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_dependent_heads_get_the_least_norm_solution(seed):
    """Three heads in a plane: an eigenvalue is rounding, of either sign."""
    g, m1, m2 = vectors(3, seed)
    gram = gram_of(np.stack([g, m1, m2, 0.3 * m1 - 1.7 * m2]))
    model = theory.lower_bound(gram, smoothness=L)
    expected = np.linalg.pinv(gram[1:, 1:], rcond=1e-10, hermitian=True) @ gram[0, 1:]
    got = theory.optimal_coefficients(model, step_size=ETA)
    equal(got, theory.coefficient_scale(ETA, L) * expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["concave", "indefinite"])
@pytest.mark.parametrize("seed", range(5))
def test_lower_bound_is_one(kind, seed):
    """And it is tight: reached along an eigenvector whose eigenvalue is -L."""
    H = hessian(kind, seed)
    g, *m = vectors(3, seed)
    objective = quadratic(g, H)
    model = theory.lower_bound(gram_of(np.stack([g, *m])), smoothness=L)
    for weights in np.random.default_rng(seed).normal(size=(20, 2)):
        total = theory.main_improvement(model, step_size=ETA)
        total = total + theory.contribution(model, weights, step_size=ETA).total
        check = theory.check_step(objective, tree(0 * g), trees([g, *m]), weights, step_size=ETA)
        assert total <= check.realised + 1e-12
    steepest = -L * np.eye(SIZE)
    check = theory.check_step(
        quadratic(g, steepest), tree(0 * g), trees([g, *m]), weights, step_size=ETA
    )
    equal(check.realised, total)


# ---------------------------------------------------------------------------------------------
# The ceiling
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("relative_step", [1e-3, 0.01, 0.1, 0.5, 0.9, 1.5])
def test_auxiliaries_gain_cosine_squared_of_what_a_better_step_size_gains(heads, relative_step):
    directions = vectors(heads + 1)
    g, m = directions[0], directions[1:]
    eta = relative_step / L
    got = theory.ceiling(gram_of(directions), step_size=eta, smoothness=L)
    projected = m.T @ np.linalg.lstsq(m.T, g, rcond=None)[0]
    cosine_squared = projected @ projected / (g @ g)
    equal(got.cosine_squared, cosine_squared)
    equal(got.step_size, (1 - relative_step) ** 2 / (2 * L) * g @ g, rtol=1e-11)
    equal(got.auxiliary, cosine_squared * got.step_size, rtol=1e-11)
    share = theory.ceiling_share(cosine_squared, eta, L)
    alone = theory.main_improvement(
        theory.lower_bound(gram_of(directions), smoothness=L), step_size=eta
    )
    equal(share, got.auxiliary / alone, rtol=1e-11)


def test_share_of_the_step_at_known_places():
    equal(theory.ceiling_share(1.0, 0.5 / L, L), 1 / 3)
    equal(theory.ceiling_share(0.2, 0.01 / L, L), 0.2 * 0.99**2 / 0.0199)
    assert abs(theory.ceiling_share(0.2, 1 / L, L)) < 1e-30


def test_no_auxiliary_helps_at_the_best_step_size():
    """Over all step sizes and coefficients together, the guarantee is greatest at 1 / L and 0."""
    directions = vectors(2)
    model = theory.lower_bound(gram_of(directions), smoothness=L)
    etas, lambdas = np.linspace(0, 2 / L, 201), np.linspace(-2, 2, 101)[:, None]

    def totals(eta):
        alone = theory.main_improvement(model, step_size=eta)
        return alone + theory.contribution(model, lambdas, step_size=eta).total

    values = np.asarray(jax.vmap(totals)(etas))
    assert np.unravel_index(values.argmax(), values.shape) == (100, 50)
    equal(values.max(), directions[0] @ directions[0] / (2 * L))
    at_best = theory.optimal_coefficients(model, step_size=theory.optimal_step_size(model))
    np.testing.assert_allclose(at_best, [0.0], atol=1e-15)


def test_ceiling_without_a_main_gradient():
    got = theory.ceiling(jnp.asarray([[0.0, 0.0], [0.0, 2.0]]), step_size=ETA, smoothness=L)
    np.testing.assert_array_equal(got, [0.0, 0.0, 0.0])


# ---------------------------------------------------------------------------------------------
# Second order
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["concave", "indefinite"])
def test_hessian_vector_product_and_curvatures_against_the_dense_hessian(kind):
    H = hessian(kind)
    directions = vectors(3)
    gradient = vectors(1, seed=9)[0]  # the main direction need not be the gradient
    objective, origin = quadratic(gradient, H), tree(np.zeros(SIZE))
    equal(flat(theory.hvp(objective, origin, tree(directions[1]))), H @ directions[1])
    model = theory.second_order(objective, origin, trees(directions))
    equal(model.first_order, directions @ gradient)
    equal(model.second_order, directions @ H @ directions.T, rtol=1e-11)


def test_hessian_vector_product_of_a_curved_function():
    def objective(params):
        return jnp.sum(jnp.sin(params["a"]) * 2) * jnp.sum(params["b"] ** 3)

    params, direction = trees(vectors(2))
    raveled, unravel = ravel_pytree(params)
    dense = jax.hessian(lambda x: objective(unravel(x)))(raveled)
    equal(flat(theory.hvp(objective, params, direction)), dense @ flat(direction))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["concave", "indefinite"])
def test_second_order_form_is_exact_on_quadratics(kind, heads):
    """Delta = eta lambda (c + eta g'Hm) + (eta^2 lambda^2 / 2) m'Hm, against J itself."""
    H = hessian(kind)
    directions = vectors(heads + 1)
    g, origin = directions[0], tree(np.zeros(SIZE))
    objective = quadratic(g, H)
    model = theory.second_order(objective, origin, trees(directions))
    for weights in np.random.default_rng(3).normal(size=(5, heads)):
        total = theory.contribution(model, weights, step_size=ETA).total
        joint = flat(theory.joint_step(trees(directions), weights, step_size=ETA))
        equal(joint, ETA * (g + weights @ directions[1:]))
        realised = objective(tree(joint)) - objective(tree(ETA * g))
        equal(total, realised, rtol=1e-10)
    lam, m = 0.4, directions[1]
    if heads == 1:
        expected = ETA * lam * (g @ m + ETA * g @ H @ m) + ETA**2 * lam**2 / 2 * m @ H @ m
        equal(theory.contribution(model, lam, step_size=ETA).total, expected)


@pytest.mark.parametrize("heads", [1, 3])
def test_second_order_optimum_agrees_with_brute_force(heads):
    H = hessian("concave")
    directions = vectors(heads + 1)
    model = theory.second_order(quadratic(directions[0], H), tree(0 * H[0]), trees(directions))
    best = np.asarray(theory.optimal_coefficients(model, step_size=ETA))
    top = float(theory.optimal_contribution(model, step_size=ETA))
    if heads == 1:
        g, m = directions
        equal(best, [-(g @ m + ETA * g @ H @ m) / (ETA * m @ H @ m)], rtol=1e-11)
    grid = np.linspace(-1, 1, 2001)[:, None]
    for ray in np.eye(heads):
        values = theory.contribution(model, best + grid * ray, step_size=ETA).total
        assert np.argmax(values) == 1000
        assert values.max() == pytest.approx(top, rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_without_a_maximiser_the_coefficient_is_infinite(sign):
    """Curvature m'Hm > 0, and 0: clipped to a symmetric range it is the best of that range."""
    for bend in (0.5, 0.0):
        model = theory.StepModel(
            jnp.asarray([1.0, 0.2 * sign]), jnp.asarray([[-1.0, 0.1], [0.1, bend]])
        )
        best = theory.optimal_coefficients(model, step_size=ETA)
        np.testing.assert_array_equal(best, [sign * np.inf])
        assert float(theory.optimal_contribution(model, step_size=ETA)) == np.inf
        grid = np.linspace(-3, 3, 61)[:, None]
        values = theory.contribution(model, grid, step_size=ETA).total
        assert grid[np.argmax(values), 0] == np.clip(best, -3, 3)[0]


def test_several_heads_without_a_maximiser_and_undefined_input():
    H = -hessian("concave")  # convex, to be increased
    directions = vectors(3)
    model = theory.second_order(quadratic(directions[0], H), tree(0 * H[0]), trees(directions))
    assert np.isnan(theory.optimal_coefficients(model, step_size=ETA)).all()
    assert float(theory.optimal_contribution(model, step_size=ETA)) == np.inf
    for heads in (1, 2):
        unknown = theory.lower_bound(jnp.full((heads + 1, heads + 1), jnp.nan), smoothness=L)
        assert np.isnan(theory.optimal_coefficients(unknown, step_size=ETA)).all()
        assert np.isnan(theory.optimal_contribution(unknown, step_size=ETA))


# ---------------------------------------------------------------------------------------------
# Preconditioned steps
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
def test_preconditioned_norm_is_a_change_of_variables(heads):
    """In x = P^(-1/2) theta the step is a plain one, and gradients become P^(1/2) g."""
    directions = vectors(heads + 1)
    p = np.random.default_rng(4).uniform(0.1, 3, SIZE)
    changed = theory.lower_bound(gram_of(np.sqrt(p) * directions), smoothness=L)
    got = theory.preconditioned_lower_bound(trees(directions), tree(p), smoothness=L)
    jax.tree.map(lambda a, b: equal(a, b), got, changed)
    if heads == 1:
        g, m = directions
        expected = (1 - L * ETA) / (L * ETA) * (g @ (p * m)) / (m @ (p * m))
        equal(theory.optimal_coefficients(got, step_size=ETA), [expected])


@pytest.mark.parametrize("norm", ["preconditioned", "euclidean"])
def test_preconditioned_bound_is_that_of_the_step_taken(norm):
    """Against the definition of both bounds; each is tight on the quadratic that reaches it."""
    g, m = directions = vectors(2)
    p = np.random.default_rng(4).uniform(0.1, 3, SIZE)
    H = -L * np.diag(1 / p) if norm == "preconditioned" else -L * np.eye(SIZE)
    model = theory.preconditioned_lower_bound(trees(directions), tree(p), smoothness=L, norm=norm)
    objective = quadratic(g, H)
    for lam in (-0.5, 0.0, 0.3, 2.0):
        check = theory.check_step(objective, tree(0 * g), trees(p * directions), lam, step_size=ETA)
        total = theory.main_improvement(model, step_size=ETA)
        total = total + theory.contribution(model, lam, step_size=ETA).total
        equal(total, check.realised)
    lambdas = np.linspace(-3, 3, 60001)[:, None]
    values = theory.contribution(model, lambdas, step_size=ETA).total
    best = theory.optimal_coefficients(model, step_size=ETA)
    np.testing.assert_allclose(best, lambdas[np.argmax(values)], atol=1e-4)
    if norm == "euclidean":
        cross = (g @ (p * m) - L * ETA * (p * g) @ (p * m)) / (L * ETA * (p * m) @ (p * m))
        equal(best, [cross])


def test_both_norms_are_the_plain_bound_without_a_preconditioner():
    directions = vectors(3)
    plain = theory.lower_bound(gram_of(directions), smoothness=L)
    for norm in ("preconditioned", "euclidean"):
        got = theory.preconditioned_lower_bound(
            trees(directions), tree(np.ones(SIZE)), smoothness=L, norm=norm
        )
        jax.tree.map(lambda a, b: equal(a, b), got, plain)


# ---------------------------------------------------------------------------------------------
# Sampling noise: a sample space so small that every expectation is a finite sum
# ---------------------------------------------------------------------------------------------

OUTCOMES, PARTS = 3, 3


def sample_space():
    """(g, m) of each outcome [OUTCOMES, 2, SIZE] and its probability; noise in common to both."""
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(OUTCOMES, SIZE))
    pairs = np.stack([noise + 0.3 * rng.normal(size=(OUTCOMES, SIZE)), noise], axis=1)
    return pairs + vectors(2, seed=6), np.array([0.5, 0.2, 0.3])


def minibatches():
    """Every minibatch of PARTS independent parts: (probability, parts [PARTS, 2, SIZE])."""
    pairs, probability = sample_space()
    for drawn in itertools.product(range(OUTCOMES), repeat=PARTS):
        yield np.prod(probability[list(drawn)]), pairs[list(drawn)]


def expected_gram():
    """E of both estimates, over all minibatches."""
    same = cross = 0
    for probability, parts in minibatches():
        stacked = tuple(jax.vmap(tree)(jnp.asarray(parts[:, i])) for i in range(2))
        got = theory.sampled_gram(stacked)
        same, cross = same + probability * got.same, cross + probability * got.cross
    return theory.SampledGram(same, cross)


def truth():
    """True gradients [2, SIZE], and tr Cov(d^_i, d^_j) [2, 2] of a minibatch's means."""
    pairs, probability = sample_space()
    mean = np.einsum("o,ois->is", probability, pairs)
    centred = pairs - mean
    covariance = np.einsum("o,ois,ojs->ij", probability, centred, centred)
    return mean, covariance / PARTS


def test_estimates_are_unbiased_by_enumeration():
    """E<g^, m^> = <g, m> + tr Cov(g^, m^) and E||m^||^2 likewise; between parts no covariance."""
    mean, covariance = truth()
    got = expected_gram()
    equal(got.cross, gram_of(mean))
    equal(got.same, gram_of(mean) + covariance)
    assert np.abs(covariance).min() > 0.5  # else the two could not be told apart


@pytest.mark.parametrize("lam", [-0.5, 0.0, 0.4, 1.5])
def test_expected_improvement_by_enumeration(lam):
    """On the quadratic that reaches the bound, over every minibatch that a step could draw."""
    (g, _), _ = truth()
    objective = quadratic(g, -L * np.eye(SIZE))
    expected = sum(
        probability
        * theory.check_step(
            objective, tree(0 * g), trees(parts.mean(axis=0)), lam, step_size=ETA
        ).realised
        for probability, parts in minibatches()
    )
    model = theory.sampled_lower_bound(expected_gram(), smoothness=L)
    got = theory.main_improvement(model, step_size=ETA)
    got = got + theory.contribution(model, lam, step_size=ETA).total
    equal(got, expected)


def test_optimum_of_the_noisy_step():
    """Only the correlation of first order is without noise; other mixtures expect less."""
    same, cross = expected_gram()
    model = theory.sampled_lower_bound(theory.SampledGram(same, cross), smoothness=L)
    best = float(theory.optimal_coefficients(model, step_size=ETA)[0])
    equal(best, (cross[0, 1] - L * ETA * same[0, 1]) / (L * ETA * same[1, 1]))
    lambdas = np.linspace(-2, 2, 40001)
    values = theory.contribution(model, lambdas[:, None], step_size=ETA).total
    np.testing.assert_allclose(lambdas[np.argmax(values)], best, atol=1e-4)
    scale = theory.coefficient_scale(ETA, L)
    for other in (scale * same[0, 1] / same[1, 1], scale * cross[0, 1] / cross[1, 1]):
        assert abs(float(other) - best) > 0.1
        worse = theory.contribution(model, other, step_size=ETA).total
        assert worse < theory.optimal_contribution(model, step_size=ETA)


def test_noisy_rule_is_optimal_for_the_sampled_bound():
    """Given what `cross_fitted` would measure: c from disjoint samples, the rest from the same."""
    same, cross = expected_gram()
    gram = same.at[0, 1].set(cross[0, 1]).at[1, 0].set(cross[0, 1])
    rule = rules.noisy_optimal(L * ETA, eps=0.0)
    measurement = measures.Measurement(gram, sampled_correlation=same[0, 1:])
    weights, _ = rule.update(measurement, (), jax.random.key(0))
    model = theory.sampled_lower_bound(theory.SampledGram(same, cross), smoothness=L)
    equal(weights[1:], theory.optimal_coefficients(model, step_size=ETA))


def test_noise_falls_with_the_batch_size():
    mean, covariance = truth()
    got = theory.at_batch_size(expected_gram(), PARTS)
    equal(got.same, gram_of(mean) + covariance / PARTS)
    equal(got.cross, gram_of(mean))


def test_without_noise_both_matrices_are_the_plain_one():
    directions = vectors(3)
    stacked = tuple(jax.tree.map(lambda x: jnp.stack([x] * 4), tree(d)) for d in directions)
    got = theory.sampled_gram(stacked)
    equal(got.same, gram_of(directions))
    equal(got.cross, gram_of(directions))


# ---------------------------------------------------------------------------------------------
# Checks on an objective
# ---------------------------------------------------------------------------------------------


def test_check_step_on_a_quadratic():
    H = hessian("indefinite")
    g, m = directions = vectors(2)
    gradient = vectors(1, seed=9)[0]
    check = theory.check_step(
        quadratic(gradient, H), tree(0 * g), trees(directions), 0.7, step_size=ETA
    )
    step = ETA * (g + 0.7 * m)
    equal(check.first_order, gradient @ step)
    equal(check.second_order, gradient @ step + step @ H @ step / 2)
    equal(check.realised, check.second_order)


def test_local_smoothness_along_eigenvectors_and_between_them():
    H = hessian("indefinite")
    values, basis = np.linalg.eigh(H)
    objective = quadratic(vectors(1)[0], H)
    origin = tree(np.zeros(SIZE))
    for value, vector in zip(values, basis.T, strict=True):
        equal(theory.local_smoothness(objective, origin, tree(3 * vector)), abs(value), rtol=1e-11)
    step = vectors(1, seed=7)[0]
    expected = np.linalg.norm(H @ step) / np.linalg.norm(step)
    equal(theory.local_smoothness(objective, origin, tree(step)), expected)
    assert expected < L
    assert float(theory.local_smoothness(objective, origin, origin)) == 0.0


def test_losses_have_the_same_coefficients_and_opposite_curvature():
    """grad loss = -grad J: the signs cancel in Gram matrices, and H is minus the loss's."""
    H = hessian("concave")
    g, m = directions = vectors(2)
    objective, origin = quadratic(g, H), tree(0 * g)

    def loss(params):
        return -objective(params)

    by_loss = theory.lower_bound(
        measures.gram_matrix((jax.grad(loss)(origin), tree(-m))), smoothness=L
    )
    jax.tree.map(equal, by_loss, theory.lower_bound(gram_of(directions), smoothness=L))
    curvature_of_loss = theory.second_order(loss, origin, trees(directions)).second_order
    equal(-curvature_of_loss, directions @ H @ directions.T, rtol=1e-11)


def test_improvement_of_the_tiny_model_is_predicted_to_second_order():
    """Halving the step divides the error by 4 to first order and by 8 to second.

    J is minus the RL loss of a decoder, g its gradient, and m minus the gradient of the MTP
    module's policy loss. Steps are so short that no token crosses the clip range's border, where
    the loss has a kink, and so long that the error is far above rounding.
    """
    mtp = MTPTrainingConfig()
    config = tiny.train_config(mtp, tiny.model_config(dtype="float64"))
    model = tiny.build_model(config.model)
    params = model[1]
    batch = tiny.minibatch(config, model)
    stages = Stages(tiny.policy(config, model), batch)

    def parts_and_hidden(params):
        parts = partition(params)
        return parts, stages.trunk(parts).hidden

    def objective(params):
        parts, hidden = parts_and_hidden(params)
        return -rl_loss(stages.head(parts, hidden, 0), batch, config)[0]

    def auxiliary(params):
        parts, hidden = parts_and_hidden(params)
        scores = stages.head(parts, stages.modules(parts, hidden)[0], 1)
        return -mtp_loss(scores, batch, 1, config)[0]

    @jax.jit
    def errors(params):
        g, m = jax.grad(objective)(params), jax.grad(auxiliary)(params)
        m = {name: m[name] if is_shared(name) else zeros(m[name]) for name in m}
        check = jax.vmap(
            lambda eta: theory.check_step(objective, params, (g, m), 0.5, step_size=eta)
        )(jnp.asarray([4e-4, 2e-4, 1e-4]))
        return abs(check.realised - check.first_order), abs(check.realised - check.second_order)

    first, second = errors(params)
    assert second.min() > 1e-12
    np.testing.assert_allclose(first[:-1] / first[1:], 4, rtol=0.02)
    np.testing.assert_allclose(second[:-1] / second[1:], 8, rtol=0.02)


# ---------------------------------------------------------------------------------------------
# Contract
# ---------------------------------------------------------------------------------------------


def test_float32_and_bfloat16_trees_and_traced_numbers():
    """Dtypes never mix by accident, sums are formed in float32, and everything compiles."""
    directions = tuple(jax.tree.map(lambda x: x.astype(jnp.bfloat16), d) for d in trees(vectors(2)))

    @jax.jit
    def everything(eta, smoothness, lam):
        def objective(params):
            return -sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in params.values())

        gram = measures.gram_matrix(directions)
        bound = theory.lower_bound(gram, smoothness=smoothness)
        taylor = theory.second_order(objective, directions[0], directions)
        parts = tuple(jax.tree.map(lambda x: jnp.stack([x, x]), d) for d in directions)
        return (
            theory.contribution(bound, lam, step_size=eta),
            theory.optimal_coefficients(taylor, step_size=eta),
            theory.ceiling(gram, step_size=eta, smoothness=smoothness),
            theory.sampled_lower_bound(theory.sampled_gram(parts), smoothness=smoothness),
            theory.preconditioned_lower_bound(directions, directions[0], smoothness=smoothness),
            theory.check_step(objective, directions[0], directions, lam, step_size=eta),
            theory.local_smoothness(objective, directions[0], directions[1]),
        )

    out = everything(*(jnp.asarray(x, jnp.float32) for x in (0.1, 2.0, 0.5)))
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
    step = theory.joint_step(directions, 0.5, step_size=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(step)} == {jnp.dtype(jnp.float32)}


def test_errors():
    directions = trees(vectors(3))
    model = theory.lower_bound(gram_of(vectors(3)), smoothness=L)
    with pytest.raises(ValueError, match=r"expected coefficients of shape \[..., K=2\], got \(\)"):
        theory.contribution(model, 0.5, step_size=ETA)
    single = theory.lower_bound(gram_of(vectors(2)), smoothness=L)
    with pytest.raises(ValueError, match=r"got \(7,\).*coefficients\[:, None\]"):
        theory.contribution(single, np.zeros(7), step_size=ETA)
    with pytest.raises(ValueError, match="expected K=2 coefficients for 3 directions"):
        theory.joint_step(directions, 0.5, step_size=ETA)
    with pytest.raises(ValueError, match="norm must be 'preconditioned' or 'euclidean'"):
        theory.preconditioned_lower_bound(directions, directions[0], smoothness=L, norm="max")
    with pytest.raises(ValueError, match="R >= 2 parts, got R = 1"):
        theory.sampled_gram(tuple(jax.tree.map(lambda x: x[None], d) for d in directions))
