"""Measures against loop-written references, and their independence of layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occ
from occ import measures


def evidence(seed=0, heads=2, rows=3, time=5):
    rng = np.random.default_rng(seed)
    return {
        "main_log_ratio": rng.normal(size=(rows, time)),
        "auxiliary_log_ratios": rng.normal(size=(heads, rows, time)),
        "response_mask": rng.random((rows, time)) < 0.6,
    }


def measured(measure, heads, arrays):
    statistics = measure.reduce({k: jnp.asarray(v) for k, v in arrays.items()}, heads)
    return measure.update(statistics, measure.init(heads, {}), None)[0]


def reference_gram(main_log_ratio, auxiliary_log_ratios, response_mask):
    """Token by token, as the paper writes it."""
    series = [main_log_ratio, *auxiliary_log_ratios]
    gram = np.zeros((len(series), len(series)))
    rows, time = response_mask.shape
    for b in range(rows):
        for t in range(time):
            if response_mask[b, t]:
                for i, left in enumerate(series):
                    for j, right in enumerate(series):
                        gram[i, j] += left[b, t] * right[b, t]
    return gram


def reference_mean_of_ratios(main_log_ratio, auxiliary_log_ratios, response_mask, masked):
    values = []
    for b, t in np.ndindex(*response_mask.shape):
        if response_mask[b, t] or not masked:
            d = auxiliary_log_ratios[0, b, t]
            values.append(main_log_ratio[b, t] * d / (d**2 + 1e-8))
    return np.mean(values)


def test_gram_matrix_of_trees_in_float64(x64):
    rng = np.random.default_rng(0)
    trees = tuple({"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)} for _ in range(3))
    vectors = np.stack([np.concatenate([t["a"].ravel(), t["b"]]) for t in trees])
    gram = measures.gram_matrix(jax.tree.map(jnp.asarray, trees))
    np.testing.assert_allclose(gram, vectors @ vectors.T, rtol=1e-13)


def test_inner_products_accumulate_in_float32():
    """4096 ones in bfloat16 would stop at 256."""
    ones = jnp.ones((4096,), jnp.bfloat16)
    product = measures.inner_product(ones, ones)
    assert product.dtype == jnp.float32
    assert float(product) == 4096.0


def test_paper_form_is_the_masked_ratio_of_sums(x64):
    arrays = evidence()
    got = measured(measures.log_ratios("paper"), 2, arrays)
    np.testing.assert_allclose(got.gram, reference_gram(**arrays), rtol=1e-12)
    assert got.ratio is None


@pytest.mark.parametrize("form", ["released_masked", "released_unmasked"])
def test_released_forms_are_means_of_ratios_of_the_first_head(x64, form):
    arrays = evidence()
    got = measured(measures.log_ratios(form), 2, arrays)
    expected = reference_mean_of_ratios(**arrays, masked=form == "released_masked")
    np.testing.assert_allclose(got.ratio, expected, rtol=1e-12)
    assert got.gram is None


def test_the_three_forms_are_different_estimators():
    arrays = {k: v.astype(np.float32) if v.dtype == float else v for k, v in evidence().items()}
    gram = measured(measures.log_ratios("paper"), 2, arrays).gram
    paper = float(gram[0, 1] / gram[1, 1])
    masked = float(measured(measures.log_ratios("released_masked"), 2, arrays).ratio)
    unmasked = float(measured(measures.log_ratios("released_unmasked"), 2, arrays).ratio)
    assert len({round(x, 3) for x in (paper, masked, unmasked)}) == 3


def test_released_measure_reports_no_correlation_and_one_coefficient_for_all_heads():
    arrays = {k: v.astype(np.float32) if v.dtype == float else v for k, v in evidence().items()}
    tx = occ.calibrate(measures.log_ratios("released_unmasked"), num_auxiliary=2)
    g = {"w": jnp.ones(3)}
    _, state = tx.update(g, tx.init(g), g, auxiliary=(g, g), **arrays)
    assert np.isnan(occ.correlation(state)).all()
    assert np.isnan(occ.perturbation(state)).all()
    weights = np.asarray(occ.coefficient(state))
    assert np.isfinite(weights).all() and weights[0] == weights[1] != 0


@pytest.mark.parametrize("form", ["paper", "released_masked"])
def test_masked_cells_may_hold_anything(form):
    arrays = evidence()
    clean = measured(measures.log_ratios(form), 2, arrays)
    mask = arrays["response_mask"]
    garbage = {
        "main_log_ratio": np.where(mask, arrays["main_log_ratio"], np.nan),
        "auxiliary_log_ratios": np.where(mask, arrays["auxiliary_log_ratios"], -np.inf),
        "response_mask": mask,
    }
    dirty = measured(measures.log_ratios(form), 2, garbage)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("form", ["paper", "released_masked"])
def test_padding_row_order_and_cuts_change_nothing(x64, form):
    """The coefficient belongs to the tokens, not to their layout."""
    arrays = evidence(rows=4)
    measure = measures.log_ratios(form)
    whole = measured(measure, 2, arrays)

    def pad(x):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 7)])

    padded = measured(measure, 2, {k: pad(v) for k, v in arrays.items()})
    shuffled = measured(measure, 2, {k: v[..., ::-1, :] for k, v in arrays.items()})
    halves = [
        measure.reduce({k: jnp.asarray(v[..., rows, :]) for k, v in arrays.items()}, 2)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    summed = jax.tree.map(jnp.add, *halves)
    cut = measure.update(summed, (), None)[0]
    for other in (padded, shuffled, cut):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), whole, other)


def test_on_policy_first_minibatch_gives_zero():
    """d_RL = 0 right after a rollout, so the proxy switches the auxiliary gradient off."""
    arrays = evidence()
    arrays["main_log_ratio"] = np.zeros_like(arrays["main_log_ratio"])
    assert float(measured(measures.log_ratios(), 2, arrays).gram[0, 1]) == 0.0
    assert float(measured(measures.log_ratios("released_unmasked"), 2, arrays).ratio) == 0.0


def test_nonfinite_evidence_switches_the_head_off():
    arrays = {k: v.astype(np.float32) if v.dtype == float else v for k, v in evidence().items()}
    arrays["response_mask"][:] = True
    arrays["auxiliary_log_ratios"][0, 0, 0] = np.inf
    tx = occ.calibrate(measures.log_ratios(), num_auxiliary=2)
    g = {"w": jnp.ones(3)}
    updates, state = tx.update(g, tx.init(g), g, auxiliary=(g, g), **arrays)
    weights = np.asarray(occ.coefficient(state))
    assert weights[0] == 0.0 and np.isfinite(weights[1]) and weights[1] != 0.0
    np.testing.assert_array_equal(state.nonfinite, [1, 0])
    assert np.isfinite(updates["w"]).all()


def test_errors():
    with pytest.raises(ValueError, match="form must be one of"):
        measures.log_ratios("mean")
    with pytest.raises(ValueError, match="eps must be >= 0"):
        measures.log_ratios(eps=-1.0)
    arrays = evidence()
    arrays["auxiliary_log_ratios"] = arrays["auxiliary_log_ratios"][0]
    with pytest.raises(ValueError, match=r"\[K=1, B, T\].*d_mtp\[None\]"):
        measured(measures.log_ratios(), 1, arrays)
