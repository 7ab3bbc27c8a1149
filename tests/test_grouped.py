"""Coefficients of groups of leaves: each group as if it were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import occ
from occ import measures, rules
from occ.grouped import GroupedCalibration
from occ.models.parameters import is_stacked, partition
from occ.training.config import MTPTrainingConfig
from occ.training.gradient.calibration import build_calibration, by_layer
from occ.training.regimes import regime
from tests import tiny


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.normal(size=(4, 3)), dtype),
        "layers": {
            "up": jnp.asarray(rng.normal(size=(2, 3, 3)), dtype),
            "scale": jnp.ones((2, 3), dtype),
        },
        "mtp": jnp.asarray(rng.normal(size=3), dtype),
    }


def flat(t):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)])


LAYERED = {"stacked": is_stacked}
PIECES = {
    "embedding": lambda t: t["embedding"],
    "layers/0": lambda t: jax.tree.map(lambda x: x[0], t["layers"]),
    "layers/1": lambda t: jax.tree.map(lambda x: x[1], t["layers"]),
}


@pytest.mark.parametrize("heads", [1, 2])
def test_every_group_is_calibrated_as_if_alone(x64, heads):
    g, ms = tree(0, jnp.float64), tuple(tree(k, jnp.float64) for k in range(1, heads + 1))
    tx = occ.calibrate_groups(by_layer, num_auxiliary=heads, **LAYERED)
    updates, state = tx.update(g, tx.init(g), g, auxiliary=ms)
    assert set(state.groups) == set(PIECES)
    alone = occ.calibrate(num_auxiliary=heads)
    for name, piece in PIECES.items():
        part, parts = piece(g), tuple(piece(m) for m in ms)
        expected, one = alone.update(part, alone.init(part), part, auxiliary=parts)
        np.testing.assert_allclose(state.groups[name].gram, one.gram, rtol=1e-13)
        np.testing.assert_allclose(flat(piece(updates)), flat(expected), rtol=1e-12)
    np.testing.assert_allclose(updates["mtp"], g["mtp"] + sum(m["mtp"] for m in ms), rtol=1e-14)
    whole = occ.calibrate(num_auxiliary=heads, shared=lambda path: by_layer(path) is not None)
    _, together = whole.update(g, whole.init(g), g, auxiliary=ms)
    np.testing.assert_allclose(occ.correlation(state), occ.correlation(together), rtol=1e-12)
    weights = [group.weights[1:] for group in state.groups.values()]
    np.testing.assert_allclose(occ.coefficient(state), np.mean(weights, axis=0), rtol=1e-12)
    assert np.ptp(weights, axis=0).min() > 1e-2


def test_one_group_is_plain_calibration():
    g, m = tree(0), tree(1)
    tx = occ.calibrate_groups(lambda path: "all")
    updates, state = tx.update(g, tx.init(g), g, auxiliary=m)
    plain = occ.calibrate()
    expected, one = plain.update(g, plain.init(g), g, auxiliary=m)
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-6)
    np.testing.assert_allclose(occ.coefficient(state), occ.coefficient(one), rtol=1e-6)


@pytest.mark.standard_promotion
def test_in_a_chain_under_jit_and_scan():
    g, m = tree(0), tree(1)
    tx = optax.chain(
        occ.calibrate_groups(by_layer, measures.smoothed(measures.gradients()), **LAYERED),
        optax.adam(1e-2),
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(g, state, params, auxiliary=m)
        return (optax.apply_updates(params, updates), state), occ.coefficient(state)

    (params, state), weights = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=3))(g)
    assert np.isfinite(flat(params)).all() and weights.shape == (3, 1)
    assert int(occ.calibration_state(state).count) == 3


def test_a_nonfinite_auxiliary_is_removed_from_every_group():
    g, m = tree(0), tree(1)
    bad = {**m, "embedding": m["embedding"].at[0, 0].set(jnp.nan)}
    tx = occ.calibrate_groups(by_layer, **LAYERED)
    updates, state = tx.update(g, tx.init(g), g, auxiliary=bad)
    np.testing.assert_array_equal(flat(updates), flat(g))
    assert [int(s.nonfinite[0]) for s in state.groups.values()] == [1, 1, 1]


@pytest.mark.slow
def test_the_train_step_takes_a_coefficient_a_layer(x64):
    """Two layers and a tied embedding: each part's gradient is g + w m with the part's own w."""
    model_config = tiny.model_config(1, "float64")
    model = tiny.build_model(model_config)
    mtp = MTPTrainingConfig(groups="layer")
    config = tiny.train_config(mtp, model_config)
    batch = tiny.minibatch(config, model)
    got = tiny.gradient(config, model, batch)
    g, m = (
        partition(tiny.gradient(tiny.train_config(c, model_config), model, batch).gradient).blocks
        for c in (regime("rl_only"), MTPTrainingConfig(rule="fixed", coefficient=1.0))
    )
    m = jax.tree.map(jnp.subtract, m, g)
    groups = got.calibration.groups
    assert {"embedding", "final_norm", "layers/0", "layers/1"} == set(groups)
    for index in (0, 1):
        one = [jax.tree.map(lambda x, i=index: x[i], tree) for tree in (g, m)]
        c, v2 = flat(one[0]) @ flat(one[1]), flat(one[1]) @ flat(one[1])
        weight = float(groups[f"layers/{index}"].weights[1])
        assert weight == pytest.approx(c / v2, rel=1e-8)
        combined = jax.tree.map(lambda x, i=index: x[i], partition(got.gradient).blocks)
        np.testing.assert_allclose(
            flat(combined), flat(one[0]) + weight * flat(one[1]), rtol=1e-8, atol=1e-12
        )
    calibration = build_calibration(dataclasses.replace(mtp, measure="cross_fitted"), 1)
    crossed = tiny.gradient(
        dataclasses.replace(config, mtp=dataclasses.replace(mtp, measure="cross_fitted")),
        model,
        batch,
        calibration,
    )
    assert np.isfinite(flat(crossed.gradient)).all()


def test_the_papers_eps_goes_with_its_measures():
    """Where a layer's gradient is short, it would take a part of the coefficient away."""
    small = [[1e-6, 1e-8], [1e-8, 1e-8]]
    gram = measures.Measurement(jnp.array(small))
    kept = {}
    for name in ("occ", "occ_smoothed", "occ_paper"):
        config = regime(name)
        for eps in (None, 1e-8):
            rule = build_calibration(dataclasses.replace(config, eps=eps), 1).rule
            kept[name, eps] = float(rule.update(gram, (), jax.random.key(0))[0][1])
    expected = {("occ", None): 1, ("occ_smoothed", None): 1, ("occ_paper", None): 0.5}
    expected |= {(name, 1e-8): 0.5 for name in ("occ", "occ_smoothed", "occ_paper")}
    assert kept == pytest.approx(expected, rel=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="does not fall into groups"):
        occ.calibrate_groups(by_layer, measures.log_ratios())
    with pytest.raises(ValueError, match="'gradients.select.' looks at some leaves alone"):
        occ.calibrate_groups(by_layer, measures.gradients(measures.layer(0)))
    with pytest.raises(ValueError, match="measured at every update, got every=2"):
        GroupedCalibration(by_layer, measures.gradients(), rules.optimal(), every=2)
    with pytest.raises(ValueError, match="names no group for any leaf.*'embedding'"):
        occ.calibrate_groups(lambda path: None).init(tree(0))
    tx = occ.calibrate_groups(by_layer, rule=rules.optimal(), **LAYERED)
    with pytest.raises(ValueError, match="`auxiliary` is missing"):
        tx.update(tree(0), tx.init(tree(0)))
    with pytest.raises(ValueError, match="groups='layer' measures the gradients of every layer"):
        MTPTrainingConfig(groups="layer", placement="fused", measure="readout")
