"""Measures that read gradients, and moving averages: closed forms and exact expectations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occ
from occ import measures


def tree(seed, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return {
        "embedding": {"table": jnp.asarray(rng.normal(size=(5, 3)), dtype)},
        "layers": {"up": jnp.asarray(rng.normal(size=(4, 3, 6)), dtype)},
        "scale": jnp.asarray(rng.normal(size=3), dtype),
    }


def flat(t):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)])


def state_of(measure, g, m, **evidence):
    """The calibration's state after one update by this measure."""
    tx = occ.calibrate(measure)
    _, state = tx.update(g, tx.init(g), g, auxiliary=m, **evidence)
    return state


def test_selected_leaves_and_layers_alone_are_measured(x64):
    g, m = tree(0), tree(1)
    cases = {
        measures.named("embedding"): lambda t: t["embedding"],
        measures.named("embedding", "scale"): lambda t: (t["embedding"], t["scale"]),
        measures.layer(0): lambda t: t["layers"]["up"][0],
        measures.layer(-1): lambda t: t["layers"]["up"][3],
    }
    for select, part in cases.items():
        got = state_of(measures.gradients(select), g, m).gram
        c, v2 = flat(part(g)) @ flat(part(m)), flat(part(m)) @ flat(part(m))
        np.testing.assert_allclose(got[0, 1], c, rtol=1e-13)
        np.testing.assert_allclose(got[1, 1], v2, rtol=1e-13)
    with pytest.raises(ValueError, match=r"takes none of the shared leaves.*embedding/table"):
        state_of(measures.gradients(measures.named("embeddings")), g, m)


def test_cross_fitting_in_closed_form(x64):
    first, second = (tree(0), tree(1)), (tree(2), tree(3))
    g, m = (jax.tree.map(lambda a, b: (a + b) / 2, first[i], second[i]) for i in (0, 1))
    measure = measures.cross_fitted()
    statistics = measure.reduce({"gradients": (g, m), "gradient_halves": (first, second)}, 1)
    got, _ = measure.update(statistics, measure.init(1, {}), None)
    cross = (flat(first[0]) @ flat(second[1]) + flat(second[0]) @ flat(first[1])) / 2
    np.testing.assert_allclose(got.gram[0, 1], cross, rtol=1e-13)
    np.testing.assert_allclose(got.gram[1, 0], cross, rtol=1e-13)
    np.testing.assert_allclose(got.gram[1, 1], flat(m) @ flat(m), rtol=1e-13)
    np.testing.assert_allclose(got.sampled_correlation[0], flat(g) @ flat(m), rtol=1e-13)
    state = state_of(measure, g, m, gradient_halves=(first, second))
    np.testing.assert_allclose(state.gram[0, 1], cross, rtol=1e-13)


def test_cross_fitting_is_free_of_the_common_noise(x64):
    """Over all pairs of samples from a finite population: E c_cross is exactly <E g, E m>, and the
    same-sample correlation exceeds it by the trace of the covariance of the halves' mean."""
    samples = [
        ({"w": jnp.asarray(g)}, {"w": jnp.asarray(m)})
        for g, m in np.random.default_rng(0).normal(size=(3, 2, 4)) + 0.5
    ]
    measure = measures.cross_fitted()
    cross, same = [], []
    for first, second in itertools.product(samples, repeat=2):
        whole = tuple({"w": (a["w"] + b["w"]) / 2} for a, b in zip(first, second, strict=True))
        got, _ = measure.update((whole, (first, second)), (), None)
        cross.append(got.gram[0, 1])
        same.append(got.sampled_correlation[0])
    g, m = (np.stack([s[i]["w"] for s in samples]) for i in (0, 1))
    true = g.mean(0) @ m.mean(0)
    covariance = np.mean(np.sum((g - g.mean(0)) * (m - m.mean(0)), axis=1))
    np.testing.assert_allclose(np.mean(cross), true, rtol=1e-12)
    np.testing.assert_allclose(np.mean(same), true + covariance / 2, rtol=1e-12)
    assert abs(covariance) > 0.1


@pytest.mark.parametrize("norm", ["preconditioned", "euclidean"])
def test_preconditioned_products(x64, norm):
    g, m = tree(0), tree(1)
    second_moment = jax.tree.map(jnp.square, tree(2))
    p = 1 / (np.sqrt(flat(second_moment)) + 1e-3)
    measure = measures.preconditioned(1e-3, norm=norm)
    arrays = {"gradients": (g, m), "second_moment": second_moment}
    got, _ = measure.update(measure.reduce(arrays, 1), (), None)
    c = flat(g) @ (p * flat(m))
    np.testing.assert_allclose(got.gram[0, 1], c, rtol=1e-12)
    np.testing.assert_allclose(got.gram[1, 0], c, rtol=1e-12)
    v2 = flat(m) @ (p * flat(m)) if norm == "preconditioned" else np.sum((p * flat(m)) ** 2)
    np.testing.assert_allclose(got.gram[1, 1], v2, rtol=1e-12)
    np.testing.assert_allclose(got.gram[0, 0], flat(g) @ (p * flat(g)), rtol=1e-12)
    if norm == "euclidean":
        same = (p * flat(g)) @ (p * flat(m))
        np.testing.assert_allclose(got.sampled_correlation[0], same, rtol=1e-12)


def test_a_uniform_preconditioner_leaves_the_coefficient(x64):
    g, m = tree(0), tree(1)
    ones = jax.tree.map(jnp.ones_like, g)
    exact = occ.coefficient(state_of(measures.gradients(), g, m))
    got = occ.coefficient(state_of(measures.preconditioned(), g, m, second_moment=ones))
    np.testing.assert_allclose(got, exact, rtol=1e-6)  # eps counts beside v^2 / 2


@pytest.mark.parametrize("name", ["row_subset", "readout"])
def test_gradients_passed_by_name(x64, name):
    g, m = tree(0), tree(1)
    other = (tree(2), tree(3))
    got = state_of(getattr(measures, name)(), g, m, **{name: other}).gram
    np.testing.assert_allclose(got, measures.gram_matrix(other), rtol=1e-13)
    with pytest.raises(ValueError, match=r"expected a tuple of K\+1=2 gradients"):
        state_of(getattr(measures, name)(), g, m, **{name: other[:1]})


def test_sketches_are_unbiased_and_new_at_every_step(x64):
    g, m = tree(0), tree(1)
    measure = measures.sketched(2, seed=1)

    @jax.jit
    def step(state, _):
        got, state = measure.update((measures_dict(g), measures_dict(m)), state, None)
        return state, got.gram

    _, grams = jax.lax.scan(step, measure.init(1, {}), length=4000)
    grams = np.asarray(grams)
    exact = np.asarray(measures.gram_matrix((g, m)))
    error = grams.std(axis=0) / np.sqrt(len(grams))
    assert (np.abs(grams.mean(axis=0) - exact) < 4 * error).all()
    assert (error / np.diag(exact).mean() < 0.05).all() and (error > 0).all()
    # At full rank a leaf is taken as it is.
    whole, _ = measures.sketched(9).update((measures_dict(g), measures_dict(m)), 0, None)
    np.testing.assert_allclose(whole.gram, exact, rtol=1e-13)


def measures_dict(t):
    """As `calibrate` hands gradients on: leaves by path."""
    from occ.trees import selected

    return selected(t, jax.tree.map(lambda _: True, t))


def test_smoothing_is_the_bias_corrected_moving_average(x64):
    decay, tx = 0.7, occ.calibrate(measures.smoothed(measures.gradients(), 0.7))
    g = tree(0)
    state, total, weight = tx.init(g), np.zeros((2, 2)), 0.0
    for step in range(5):
        g, m = tree(2 * step), tree(2 * step + 1)
        _, state = tx.update(g, state, g, auxiliary=m)
        total = decay * total + (1 - decay) * np.asarray(measures.gram_matrix((g, m)))
        weight = decay * weight + 1 - decay
        np.testing.assert_allclose(state.gram, total / weight, rtol=1e-12)
    np.testing.assert_allclose(
        occ.coefficient(state)[0], state.gram[0, 1] / state.gram[1, 1], rtol=1e-7
    )


def test_a_nonfinite_gradient_does_not_enter_the_average():
    tx = occ.calibrate(measures.smoothed(measures.gradients(), 0.5))
    g, m = tree(0, jnp.float32), tree(1, jnp.float32)
    _, before = tx.update(g, tx.init(g), g, auxiliary=m)
    bad = {**m, "scale": m["scale"].at[0].set(jnp.nan)}
    _, after = tx.update(g, before, g, auxiliary=bad)
    assert float(occ.coefficient(after)[0]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, after.measure, before.measure)


def test_evidence_that_is_not_finite_does_not_enter_the_average():
    """The auxiliary gradient is finite, and one of the halves is not."""
    tx = occ.calibrate(measures.smoothed(measures.cross_fitted(), 0.5))
    g, m = tree(0, jnp.float32), tree(1, jnp.float32)
    halves = ((g, m), (g, m))
    _, before = tx.update(g, tx.init(g), g, auxiliary=m, gradient_halves=halves)
    bad = {**m, "scale": m["scale"].at[0].set(jnp.nan)}
    _, after = tx.update(g, before, g, auxiliary=m, gradient_halves=((g, m), (g, bad)))
    assert float(occ.coefficient(after)[0]) == 0.0
    np.testing.assert_array_equal(after.nonfinite, [1])
    jax.tree.map(np.testing.assert_array_equal, after.measure, before.measure)


def test_every_third_update_measures_and_the_others_keep_the_weights(x64):
    tx = occ.calibrate(every=3)
    g = tree(0)
    state = tx.init(g)
    for step in range(7):
        g, m = tree(2 * step), tree(2 * step + 1)
        updates, state = tx.update(g, state, g, auxiliary=m)
        if step % 3 == 0:
            expected = flat(g) @ flat(m) / (flat(m) @ flat(m))
        np.testing.assert_allclose(occ.coefficient(state)[0], expected, rtol=1e-7)
        np.testing.assert_allclose(flat(updates), flat(g) + expected * flat(m), rtol=1e-6)
        assert int(state.count) == step + 1


def test_a_removed_auxiliary_counts_in_updates_that_do_not_measure_too():
    tx = occ.calibrate(every=2)
    g, m = tree(0, jnp.float32), tree(1, jnp.float32)
    bad = jax.tree.map(lambda x: x * jnp.nan, m)
    _, state = tx.update(g, tx.init(g), g, auxiliary=m)
    weight = float(occ.coefficient(state)[0])
    updates, state = tx.update(g, state, g, auxiliary=bad)
    np.testing.assert_array_equal(flat(updates), flat(g))
    assert int(state.nonfinite[0]) == 1 and float(occ.coefficient(state)[0]) == weight != 0


def test_errors():
    with pytest.raises(ValueError, match="norm must be 'preconditioned' or 'euclidean'"):
        measures.preconditioned(norm="l2")
    with pytest.raises(ValueError, match="eps must be > 0"):
        measures.preconditioned(0.0)
    with pytest.raises(ValueError, match="rank must be >= 1"):
        measures.sketched(0)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        measures.smoothed(measures.gradients(), 1.0)
    with pytest.raises(ValueError, match="average of ratios"):
        measures.smoothed(measures.log_ratios("released_masked"))
    with pytest.raises(ValueError, match="`every` must be >= 1"):
        occ.calibrate(every=0)
    g = tree(0, jnp.float32)
    tx = occ.calibrate(measures.cross_fitted())
    with pytest.raises(ValueError, match=r"needs the evidence \['gradient_halves'\], got none"):
        tx.update(g, tx.init(g), g, auxiliary=g)
    with pytest.raises(ValueError, match="no measure that could sum it"):
        tx = occ.accumulate(tx, 2)
        tx.update(g, tx.init(g), g, auxiliary=g, gradient_halves=((g, g), (g, g)))
