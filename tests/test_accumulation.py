"""occ.accumulate: the coefficient of the whole minibatch, however it was cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import occ
from occ import measures

COUNTS = (3.0, 5.0, 4.0)


def gradients(seed, heads):
    """Per micro-batch *sums* over tokens, main gradient and K auxiliary ones."""
    rng = np.random.default_rng(seed)

    def make():
        return {"w": jnp.asarray(rng.normal(size=4)), "b": jnp.asarray(rng.normal(size=2))}

    return [(make(), tuple(make() for _ in range(heads))) for _ in COUNTS]


def mean(trees, count):
    return jax.tree.map(lambda *xs: sum(xs) / count, *trees)


@pytest.mark.parametrize("heads", [1, 2])
def test_equals_the_whole_batch(x64, heads):
    micro = gradients(0, heads)
    total = sum(COUNTS)
    g = mean([g for g, _ in micro], total)
    ms = tuple(mean([m[k] for _, m in micro], total) for k in range(heads))
    tx = optax.chain(occ.calibrate(num_auxiliary=heads), optax.sgd(1.0))
    expected, expected_state = tx.update(g, tx.init(g), g, auxiliary=ms)
    accumulated = occ.accumulate(tx, len(COUNTS), num_auxiliary=heads)
    step = jax.jit(accumulated.update)
    state = accumulated.init(g)
    for round_ in range(2):  # the second minibatch starts from empty sums
        for (grads, aux), count in zip(micro, COUNTS, strict=True):
            updates, state = step(grads, state, g, auxiliary=aux, count=count)
            if count != COUNTS[-1]:
                assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(updates))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), updates, expected)
        assert int(occ.calibration_state(state).count) == round_ + 1
    np.testing.assert_allclose(occ.coefficient(state), occ.coefficient(expected_state), rtol=1e-12)


@pytest.mark.parametrize("form", measures.LOG_RATIO_FORMS)
def test_evidence_is_summed_over_micro_batches(x64, form):
    rng = np.random.default_rng(1)
    arrays = {
        "main_log_ratio": rng.normal(size=(6, 4)),
        "auxiliary_log_ratios": rng.normal(size=(1, 6, 4)),
        "response_mask": rng.random((6, 4)) < 0.5,
    }
    micro = gradients(2, 1)
    measure = measures.log_ratios(form)
    tx = occ.calibrate(measure)
    g, m = mean([g for g, _ in micro], 3), mean([m[0] for _, m in micro], 3)
    expected, expected_state = tx.update(g, tx.init(g), g, auxiliary=m, **arrays)
    accumulated = occ.accumulate(tx, 3, measure=measure)
    state = accumulated.init(g)
    for i, (grads, aux) in enumerate(micro):
        part = {k: v[..., 2 * i : 2 * i + 2, :] for k, v in arrays.items()}
        updates, state = accumulated.update(grads, state, g, auxiliary=aux, **part)
    np.testing.assert_allclose(occ.coefficient(state), occ.coefficient(expected_state), rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), updates, expected)


@pytest.mark.standard_promotion
def test_multisteps_is_the_trap_that_this_avoids(x64):
    """optax.MultiSteps measures the last micro-batch's auxiliary gradient against the mean."""
    micro = gradients(3, 1)
    tx = occ.calibrate()
    g, m = mean([g for g, _ in micro], 3), mean([m[0] for _, m in micro], 3)
    _, right = tx.update(g, tx.init(g), g, auxiliary=m)
    _, last = tx.update(g, tx.init(g), g, auxiliary=micro[-1][1][0])
    multi = optax.MultiSteps(tx, 3)
    state = multi.init(g)
    for grads, aux in micro:
        _, state = multi.update(grads, state, g, auxiliary=aux[0])
    np.testing.assert_allclose(occ.coefficient(state), occ.coefficient(last), rtol=1e-6)
    assert abs(float(occ.coefficient(state)[0] - occ.coefficient(right)[0])) > 0.01


def test_auxiliary_counts_of_their_own(x64):
    g = {"w": jnp.array([1.0, 2.0])}
    accumulated = occ.accumulate(occ.calibrate(rule=occ.rules.fixed(1.0)), 2)
    state = accumulated.init(g)
    for _ in range(2):
        updates, state = accumulated.update(
            g, state, g, auxiliary=g, count=4.0, auxiliary_count=2.0
        )
    np.testing.assert_allclose(updates["w"], g["w"] / 4 + g["w"] / 2, rtol=1e-12)


def test_bfloat16_micro_batches_are_summed_in_float32():
    g = {"w": jnp.ones((2,), jnp.bfloat16)}
    small = {"w": jnp.full((2,), 0.003, jnp.bfloat16)}
    tx = occ.calibrate(rule=occ.rules.fixed(0.0))
    accumulated = occ.accumulate(tx, 3)
    state = accumulated.init(g)
    for grads in (g, small, small):
        updates, state = accumulated.update(grads, state, g, auxiliary=g, count=1 / 3)
    assert updates["w"].dtype == jnp.bfloat16
    assert float(updates["w"][0]) > 1.0


def test_errors():
    g = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=">= 1 micro-batches, got 0"):
        occ.accumulate(occ.calibrate(), 0)
    tx = occ.accumulate(occ.calibrate(measures.log_ratios()), 2)
    with pytest.raises(ValueError, match="no measure that could sum it"):
        tx.update(g, tx.init(g), g, auxiliary=g, main_log_ratio=jnp.zeros((1, 1)))
    tx = occ.accumulate(occ.calibrate(), 2, measure=measures.log_ratios())
    with pytest.raises(ValueError, match="in every micro-batch"):
        tx.update(g, tx.init(g), g, auxiliary=g)
    tx = occ.accumulate(occ.calibrate(), 2, num_auxiliary=2)
    with pytest.raises(ValueError, match="num_auxiliary=2"):
        tx.update(g, tx.init(g), g, auxiliary=g)
