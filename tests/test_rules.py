"""Rules in closed form, and against what they are defined by, computed from the vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import rules
from occ.measures import Measurement
from occ.rules import projection

KEY = jax.random.key(0)


def weigh(rule, gram=None, ratio=None, heads=1, key=KEY, sampled=None):
    gram = jnp.full((heads + 1, heads + 1), jnp.nan) if gram is None else jnp.asarray(gram)
    heads = gram.shape[0] - 1
    signal = None
    if rule.takes_signal:
        sampled, signal = gram[0, 1:] / 2 if sampled is None else sampled, gram[0]
    weights, _ = rule.update(Measurement(gram, ratio, sampled, signal), rule.init(heads), key)
    return np.asarray(weights)


def vectors(seed, heads, size=6):
    """A main gradient and K auxiliary ones, of different lengths, as rows."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(heads + 1, size)) * np.exp(rng.normal(size=(heads + 1, 1)))


def pair(cosine, length=3.0):
    """The Gram matrix of ||g|| = 2 and ||m|| = length at an angle."""
    return np.array([[4.0, 2 * length * cosine], [2 * length * cosine, length**2]])


# -------------------------------------------------------------------------------------- optimal


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
    joint = weigh(rules.optimal(), gram)[1:]
    np.testing.assert_allclose(joint, [alone / 2, alone / 2], rtol=1e-3)


def test_ridge_keeps_nearly_collinear_heads_from_large_opposite_weights():
    gram = np.array([[1.0, 0.5, 0.6], [0.5, 1.0, 0.9999], [0.6, 0.9999, 1.0]])
    without = weigh(rules.optimal(relative_ridge=0.0), gram)[1:]
    ridged = weigh(rules.optimal(relative_ridge=0.1), gram)[1:]
    assert np.abs(without).max() > 100
    assert np.abs(ridged).max() < 1.5


def test_orthogonal_heads_decouple():
    gram = [[1.0, 0.5, -0.2], [0.5, 2.0, 0.0], [-0.2, 0.0, 4.0]]
    got = weigh(rules.optimal(relative_ridge=0.0), gram)
    np.testing.assert_allclose(got, [1.0, 0.25, -0.05], rtol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [(None, -2.0), (rules.NONNEGATIVE, 0.0), ((-0.5, 0.5), -0.5), ((-9.0, -3.0), -3.0)],
)
def test_bounds(bounds, expected):
    gram = [[1.0, -2.0], [-2.0, 1.0]]
    np.testing.assert_allclose(weigh(rules.optimal(bounds=bounds), gram)[1], expected, rtol=1e-6)
    noisy = rules.noisy_optimal(0.5, bounds=bounds)
    np.testing.assert_allclose(weigh(noisy, gram)[1], expected, rtol=1e-6)


def test_optimal_takes_a_ratio():
    got = weigh(rules.optimal(0.1), ratio=jnp.array([2.0, 2.0]), heads=2)
    np.testing.assert_allclose(got, [1, 0.2, 0.2], rtol=1e-6)


def test_scale_may_be_traced():
    gram = jnp.array([[1.0, 1.0], [1.0, 2.0]])
    got = jax.jit(lambda s: rules.optimal(s).update(Measurement(gram), (), KEY)[0])(3.0)
    np.testing.assert_allclose(got, [1.0, 1.5], rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 3])
def test_noisy_optimal_maximises_the_expected_bound(x64, heads):
    """dJ >= <G, step> - L/2 ||step||^2 with step = eta (g + m'w), where G is the true gradient.

    At the maximum over w its derivative vanishes, and the bound there is no less than around it.
    """
    rng = np.random.default_rng(heads)
    rows, true = vectors(heads, heads), rng.normal(size=6)
    g, m = rows[0], rows[1:]
    gram = rows @ rows.T
    gram[0, 1:] = gram[1:, 0] = m @ true
    smoothness, rate = 3.0, 0.1
    rule = rules.noisy_optimal(smoothness * rate, eps=0.0, relative_ridge=0.0)
    w = weigh(rule, gram, sampled=jnp.asarray(m @ g))[1:]

    def bound(w):
        step = rate * (g + w @ m)
        return true @ step - smoothness / 2 * step @ step

    slope = rate * m @ (true - smoothness * rate * (g + w @ m))
    assert np.abs(slope).max() < 1e-12
    assert all(bound(w) > bound(w + 0.01 * rng.normal(size=heads)) for _ in range(5))


def test_noisy_optimal_without_a_sampled_correlation_is_optimal_with_its_scale(x64):
    gram = vectors(0, 2) @ vectors(0, 2).T
    got = weigh(rules.noisy_optimal(0.2), gram)
    np.testing.assert_allclose(got, weigh(rules.optimal(0.8 / 0.2), gram), rtol=1e-12)


def test_step_smoothness_may_be_traced():
    gram = jnp.array([[1.0, 1.0], [1.0, 2.0]])
    got = jax.jit(lambda s: rules.noisy_optimal(s).update(Measurement(gram), (), KEY)[0])(0.25)
    np.testing.assert_allclose(got, [1.0, 1.5], rtol=1e-6)


# --------------------------------------------------------------------------------------- fixed


def test_fixed_and_detach_do_not_look():
    np.testing.assert_allclose(weigh(rules.fixed(0.2), heads=3), [1, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(weigh(rules.fixed([0.1, 0.3]), heads=2), [1, 0.1, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(weigh(rules.detach(), heads=2), [1, 0, 0])
    assert rules.detach().name == "detach"


# ---------------------------------------------------------------------------------- projection


@pytest.mark.parametrize(("cosine", "weight", "gate"), [(0.5, 0.5, 1), (0, 0, 0), (-0.5, 0, 0)])
def test_cosine_gating_by_angle(cosine, weight, gate):
    soft, hard = rules.cosine_gating(), rules.cosine_gating(weighted=False)
    np.testing.assert_allclose(weigh(soft, pair(cosine)), [1, weight], atol=1e-6)
    np.testing.assert_array_equal(weigh(hard, pair(cosine)), [1, gate])


def test_an_estimated_cosine_never_exceeds_one():
    """A cross-fitted correlation may exceed the product of the norms."""
    np.testing.assert_array_equal(weigh(rules.cosine_gating(), [[1.0, 9.0], [9.0, 1.0]]), [1, 1])


def test_pcgrad_leaves_agreement_alone_and_projects_a_conflict_on_both_sides():
    np.testing.assert_array_equal(weigh(rules.pcgrad(), pair(0.5)), [1, 1])
    c = -0.5 * 2 * 3
    expected = [1 - c / 4, 1 - c / 9]
    np.testing.assert_allclose(weigh(rules.pcgrad(), pair(-0.5)), expected, rtol=1e-6)


def test_asymmetric_pcgrad_leaves_the_main_gradient_its_first_order_gain(x64):
    """Each auxiliary part is orthogonal to g, or agrees with it: <g, d> >= ||g||^2."""
    rows = vectors(4, 3)
    weights = weigh(rules.pcgrad(symmetric=False), rows @ rows.T)
    expected = rows[0].copy()
    for m in rows[1:]:
        expected += m - min(0, m @ rows[0]) / (rows[0] @ rows[0]) * rows[0]
    np.testing.assert_allclose(weights @ rows, expected, rtol=1e-12)
    np.testing.assert_array_equal(weights[1:], [1, 1, 1])
    assert rows[0] @ expected >= rows[0] @ rows[0]


def surgery(rows, orders):
    """PCGrad as the paper writes it, on vectors."""
    total = np.zeros_like(rows[0])
    for i, g in enumerate(rows):
        projected = g.copy()
        for j in orders[i]:
            if j != i and projected @ rows[j] < 0:
                projected -= projected @ rows[j] / (rows[j] @ rows[j]) * rows[j]
        total += projected
    return total


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_equals_a_loop_over_vectors(x64, seed):
    rows, key = vectors(seed, 3, size=4), jax.random.key(seed)
    got = weigh(rules.pcgrad(), rows @ rows.T, key=key) @ rows
    expected = surgery(rows, np.asarray(projection._orders(key, 4)))
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


def test_pcgrad_draws_its_orders_from_the_key():
    """Three vectors at 120 degrees, lifted a little: who is met first matters."""
    rows = np.array([[1, 0, 0.1], [-0.5, 0.9, 0.2], [-0.5, -0.9, 0.3]])
    results = {tuple(weigh(rules.pcgrad(), rows @ rows.T, key=jax.random.key(s))) for s in range(9)}
    assert len(results) > 1
    orders = np.asarray(projection._orders(KEY, 5))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(5), (5, 1)))


def test_pcgrad_never_projects_a_gradient_on_itself():
    """What two projections left of it may point away from it."""
    rows = np.array([[1, 0], [-np.sqrt(0.75), 0.5], [-np.sqrt(0.75), -0.5]])
    orders = [[1, 2, 0], [1, 0, 2], [2, 0, 1]]
    got = np.asarray(projection._surgery(jnp.asarray(rows @ rows.T), jnp.array(orders))) @ rows
    np.testing.assert_allclose(got, surgery(rows, orders), atol=1e-6)


def vaccine(rows, orders, targets, decay):
    """GradVac as the paper writes it, on vectors; changes the targets."""
    total = np.zeros_like(rows[0])
    for i, g in enumerate(rows):
        turned = g.copy()
        for j in orders[i]:
            if j == i:
                continue
            length, other = np.linalg.norm(turned), np.linalg.norm(rows[j])
            cosine, target = turned @ rows[j] / (length * other), targets[i, j]
            if cosine < target:
                sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
                turned += (
                    length * (target * sine - cosine * target_sine) / (other * target_sine)
                ) * rows[j]
                assert abs(np.cos(np.arccos(target)) - _cos(turned, rows[j])) < 1e-9
            targets[i, j] = decay * target + (1 - decay) * cosine
        total += turned
    return total


def _cos(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_gradvac_equals_a_loop_over_vectors_for_several_steps(x64):
    """The first steps agree, so that the targets rise, and the later ones conflict."""
    rule, targets = rules.gradvac(decay=0.7), np.zeros((4, 4))
    state = rule.init(3)
    update = jax.jit(rule.update)
    for step in range(6):
        rows = vectors(step, 3) + (2.0 if step < 3 else 0.0)
        key = jax.random.key(step)
        weights, state = update(Measurement(jnp.asarray(rows @ rows.T)), state, key)
        expected = vaccine(rows, np.asarray(projection._orders(key, 4)), targets, 0.7)
        np.testing.assert_allclose(np.asarray(weights) @ rows, expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(state.targets, targets, rtol=1e-11, atol=1e-12)


def test_gradvac_with_targets_at_zero_is_pcgrad(x64):
    rows = vectors(1, 2)
    got = weigh(rules.gradvac(decay=1.0), rows @ rows.T)
    np.testing.assert_allclose(got, weigh(rules.pcgrad(), rows @ rows.T), rtol=1e-12)


def test_gradvac_with_equal_gradients_stays_bounded():
    """Their cosine is 1 up to rounding, and so is the target after a while."""
    rule = rules.gradvac(decay=0.5)

    def body(state, jitter):
        gram = jnp.full((2, 2), 0.3) - jitter * (1 - jnp.eye(2))
        weights, state = rule.update(Measurement(gram), state, KEY)
        return state, weights

    _, weights = jax.lax.scan(body, rule.init(1), jnp.tile(jnp.array([0.0, 1e-7]), 20))
    np.testing.assert_allclose(weights, np.ones((40, 2)), atol=1e-3)


# --------------------------------------------------------------------------------- convex hull


@pytest.mark.parametrize(
    ("cosine", "length", "expected"),
    [
        (0.0, 2.0, [0.5, 0.5]),
        (-1.0, 6.0, [0.75, 0.25]),  # opposed: they cancel
        (1.0, 1.0, [0.0, 1.0]),  # aligned: the shorter one
        (0.9, 9.0, [1.0, 0.0]),  # the other is no nearer
        (-0.3, 3.0, [10.8 / 16.6, 5.8 / 16.6]),
    ],
)
def test_mgda_for_two_gradients_in_closed_form(cosine, length, expected):
    got = weigh(rules.mgda(), pair(cosine, length))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_mgda_satisfies_the_condition_of_the_shortest_vector(x64, seed):
    """d is the shortest vector of a convex hull if and only if <d, g_i> >= ||d||^2 for all i."""
    rows = vectors(seed, heads=1 + seed % 3, size=3 + seed % 2)
    weights = weigh(rules.mgda(), rows @ rows.T)
    d = weights @ rows
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    assert (rows @ d - d @ d).min() > -1e-10 * np.linalg.norm(rows) ** 2


@pytest.mark.parametrize("radius", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_cagrad_attains_the_dual_bound(x64, seed, radius):
    """min_i <d, g_i> of any d in the ball is at most <g_w, g_0> + s ||g_w||, for any w.

    Where both are equal, d maximises and w minimises.
    """
    rows = vectors(seed, heads=1 + seed % 3, size=6)
    weights = weigh(rules.cagrad(radius), rows @ rows.T)
    mean = rows.mean(axis=0)
    slope, d = radius * np.linalg.norm(mean), weights @ rows
    assert np.linalg.norm(d - mean) <= slope + 1e-9 * np.linalg.norm(mean)
    if radius == 0:
        np.testing.assert_allclose(weights, 1 / len(rows), rtol=1e-12)
        return
    hull = (weights - 1 / len(rows)) / (weights - 1 / len(rows)).sum()
    assert hull.min() > -1e-9
    g_w = hull @ rows
    dual = g_w @ mean + slope * np.linalg.norm(g_w)
    np.testing.assert_allclose((rows @ d).min(), dual, rtol=1e-7, atol=1e-9)


def test_cagrad_near_a_balance_leaves_the_mean():
    """Two gradients cancel and a third is orthogonal: g_w vanishes, its direction is noise."""
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    weights = weigh(rules.cagrad(0.5), rows @ rows.T)
    np.testing.assert_allclose(weights @ rows, rows.mean(axis=0), atol=1e-4)
    assert np.abs(weights).max() < 1e3


def test_hull_rules_refuse_more_gradients_than_they_can_try():
    with pytest.raises(ValueError, match="at most 9 auxiliary gradients, got 10"):
        weigh(rules.mgda(), np.eye(11))


# ----------------------------------------------------------------------------------- balancing


@pytest.mark.parametrize("cosine", [-1.0, -0.6, 0.0, 0.8, 1.0])
def test_balancing_two_gradients_in_closed_form(x64, cosine):
    """With ||g|| = 2, ||m|| = 3. Singular values: s^2 of the matrix [[4, 6 cos], [6 cos, 9]]."""
    gram = pair(cosine)
    np.testing.assert_allclose(weigh(rules.imtl_g(), gram), [0.6, 0.4], rtol=1e-9)
    if abs(cosine) == 1:
        return
    nash = np.array([1 / 2, 1 / 3]) / np.sqrt(1 + cosine)
    got = weigh(rules.nash_mtl(relative_ridge=0.0), gram)
    np.testing.assert_allclose(got, nash, rtol=1e-12)
    least = np.sqrt(6.5 - np.sqrt(2.5**2 + 36 * cosine**2))
    largest = np.sqrt(6.5 + np.sqrt(2.5**2 + 36 * cosine**2))
    # The root of a 2 x 2 matrix M is (M + sqrt(det M) I) / sqrt(tr M + 2 sqrt(det M)).
    root = (gram + least * largest * np.eye(2)) / (least + largest)
    expected = least * np.linalg.solve(root, [1, 1])
    np.testing.assert_allclose(weigh(rules.aligned_mtl(), gram), expected, rtol=1e-11)


@pytest.mark.parametrize("seed", range(4))
def test_imtl_g_has_equal_projections(x64, seed):
    rows = vectors(seed, heads=3)
    weights = weigh(rules.imtl_g(), rows @ rows.T)
    projections = rows @ (weights @ rows) / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-9)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_nash_mtl_solves_its_equation(x64, seed):
    rows = vectors(seed, heads=3)
    gram = rows @ rows.T
    weights = weigh(rules.nash_mtl(relative_ridge=0.0), gram)
    assert (weights > 0).all()
    np.testing.assert_allclose(gram @ weights * weights, 1, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(weights @ rows), 2, rtol=1e-9)  # sqrt(K+1)


def test_nash_mtl_gives_no_direction_where_gradients_balance():
    weights = weigh(rules.nash_mtl(), pair(-1.0))
    assert np.isfinite(weights).all()
    assert abs(weights @ np.array([2.0, -3.0])) < 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_aligned_mtl_sums_the_orthogonal_factor(x64, seed):
    """U diag(s) V' with every s replaced by the least, by a singular value decomposition."""
    rows = vectors(seed, heads=2)
    u, s, vt = np.linalg.svd(rows, full_matrices=False)
    got = weigh(rules.aligned_mtl(), rows @ rows.T) @ rows
    np.testing.assert_allclose(got, (s[-1] * u @ vt).sum(axis=0), rtol=1e-9)


def test_aligned_mtl_leaves_out_components_that_do_not_exist():
    """m = 3 g: one component, of length sqrt(10) |g|, in both rows alike."""
    weights = weigh(rules.aligned_mtl(), [[1.0, 3.0], [3.0, 9.0]])
    np.testing.assert_allclose(weights, [0.4, 1.2], rtol=1e-5)


def test_metabalance_follows_the_averages_of_the_norms(x64):
    rule = rules.metabalance(0.7, decay=0.9)
    state, averages = rule.init(2), np.zeros(3)
    for step in range(5):
        rows = vectors(step, 2)
        gram = jnp.asarray(rows @ rows.T)
        weights, state = rule.update(Measurement(gram), state, KEY)
        averages = 0.9 * averages + 0.1 * np.linalg.norm(rows, axis=1)
        expected = 0.7 * averages[0] / averages + 0.3
        np.testing.assert_allclose(weights, expected, rtol=1e-11)


def test_metabalance_without_memory_matches_the_norms():
    rule = rules.metabalance(1.0, decay=0.0)
    np.testing.assert_allclose(weigh(rule, pair(-0.5, 8.0)), [1, 0.25], rtol=1e-6)


def test_metabalance_skips_zero_gradients():
    """They get weight 0, and neither pull their average down nor spike when they are back."""
    rule = rules.metabalance(1.0)
    state = rule.init(1)
    here, gone = jnp.array([[1.0, 0.0], [0.0, 4.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    seen = []
    for gram in [gone, gone, here, gone, gone, here]:
        weights, state = rule.update(Measurement(gram), state, KEY)
        seen.append(float(weights[1]))
    np.testing.assert_allclose(seen, [0, 0, 0.5, 0, 0, 0.5], rtol=1e-6)


# -------------------------------------------------------------------------------- all of them

SYMMETRIC = ["aligned_mtl", "cagrad", "imtl_g", "mgda", "nash_mtl"]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_rules_leave_zero_gradients_out(x64, name):
    """As if they were not there; without a main gradient, as if nothing else were there."""
    rows, rule = vectors(0, 2), rules.by_name(name)
    gram = rows @ rows.T
    holed = np.zeros((4, 4))
    holed[np.ix_([0, 1, 3], [0, 1, 3])] = gram
    np.testing.assert_allclose(weigh(rule, holed)[[0, 1, 3]], weigh(rule, gram), rtol=1e-9)
    assert weigh(rule, holed)[2] == 0
    gram[0] = gram[:, 0] = 0
    np.testing.assert_array_equal(weigh(rule, gram), [1, 0, 0])


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_rules_do_not_know_which_gradient_is_the_main_one(x64, name):
    rows, rule = vectors(3, 2), rules.by_name(name)
    weights = weigh(rule, rows @ rows.T)
    permuted = rows[[2, 0, 1]]
    np.testing.assert_allclose(weigh(rule, permuted @ permuted.T), weights[[2, 0, 1]], rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", [*SYMMETRIC, "pcgrad", "gradvac", "metabalance", "cosine_gating"])
def test_units_do_not_matter(name, scale):
    """In float32, where squares of the scale come near the range's ends. Nash-MTL divides by it."""
    rows, rule = vectors(1, 2), rules.by_name(name)
    gram = (rows @ rows.T).astype(np.float32)
    expected = weigh(rule, gram) / (np.sqrt(scale) if name == "nash_mtl" else 1)
    np.testing.assert_allclose(weigh(rule, gram * np.float32(scale)), expected, rtol=2e-4)


@pytest.mark.parametrize("name", rules.REGISTRY)
def test_matrices_that_no_vectors_have_give_finite_weights(name):
    """A cross-fitted correlation makes the matrix indefinite."""
    gram = np.array([[1.0, -3.0, 2.0], [-3.0, 1.0, 1.5], [2.0, 1.5, 1.0]])
    options = {
        "fixed": {"coefficients": 0.1},
        "noisy_optimal": {"step_smoothness": 0.5},
        "replay": {"series": [0.1]},
    }
    assert np.isfinite(weigh(rules.by_name(name, **options.get(name, {})), gram)).all()


def test_registry_names_every_rule_that_is_exported():
    factories = {n for n in rules.__all__ if n.islower() and n not in ("by_name", "register")}
    assert set(rules.REGISTRY) == factories
    assert rules.by_name("pcgrad", symmetric=False).name == "pcgrad(asymmetric)"


def test_replay_plays_its_series_and_stays_with_the_last():
    rule = rules.replay([0.3, -0.1])
    state, got = rule.init(2), []
    for _ in range(4):
        weights, state = rule.update(Measurement(jnp.full((3, 3), jnp.nan)), state, KEY)
        got.append(np.asarray(weights))
    expected = [[1, w, w] for w in (0.3, -0.1, -0.1, -0.1)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected a series \[N >= 1\], got shape \(0,\)"):
        rules.replay([])


def test_errors():
    with pytest.raises(ValueError, match="expected 1 or K=2 coefficients"):
        weigh(rules.fixed([0.1, 0.2, 0.3]), heads=2)
    with pytest.raises(ValueError, match="must be >= 0"):
        rules.optimal(eps=-1e-8)
    with pytest.raises(ValueError, match="low <= high"):
        rules.optimal(bounds=(1.0, 0.0))
    for outside in (0, 1, -0.5, 2.0):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\), got"):
            rules.noisy_optimal(outside)
    with pytest.raises(ValueError, match=r"gradvac: decay must be in \[0, 1\]"):
        rules.gradvac(decay=1.5)
    with pytest.raises(ValueError, match="cagrad: radius must be >= 0"):
        rules.cagrad(-0.1)
    with pytest.raises(ValueError, match=r"metabalance: relax must be in \[0, 1\]"):
        rules.metabalance(1.5)
    with pytest.raises(ValueError, match=r"metabalance: decay must be in \[0, 1\)"):
        rules.metabalance(decay=1.0)
    with pytest.raises(ValueError, match="nash_mtl: relative_ridge must be >= 0"):
        rules.nash_mtl(max_iterations=0)
    with pytest.raises(ValueError, match=r"expected one of \['aligned_mtl', .*got 'gradnorm'"):
        rules.by_name("gradnorm")
    with pytest.raises(ValueError, match=r"'cagrad' has no option \['c'\]; it takes \['radius'\]"):
        rules.by_name("cagrad", c=0.5)
    with pytest.raises(ValueError, match=r"'fixed' needs \['coefficients'\]"):
        rules.by_name("fixed")
