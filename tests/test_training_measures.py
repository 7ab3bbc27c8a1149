"""What the train step's measures are given: halves, rows, readout, moments, and when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from occ import measures
from occ.models.parameters import is_shared
from occ.training.batch import take_rows
from occ.training.config import (
    MTPTrainingConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from occ.training.gradient.calibration import build_calibration
from occ.training.optimizer import build_optimizer, second_moment
from occ.training.regimes import regime
from tests import tiny


def setup(training, heads=1, seed=0, objective=None, **model_changes):
    model_config = tiny.model_config(heads, "float64", **model_changes)
    model = tiny.build_model(model_config)
    changes = {} if objective is None else {"objective": objective}
    config = tiny.train_config(training, model_config, **changes)
    return config, model, tiny.minibatch(config, model, seed)


def only_shared(tree):
    return {name: tree[name] for name in tree if is_shared(name)}


@pytest.mark.release
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_halves_make_up_the_whole(x64, aggregation):
    """Gradient, matrix and metrics from two halves of unequal token counts are the minibatch's."""
    objective = ObjectiveConfig(aggregation=aggregation)
    config, model, batch = setup(regime("occ"), 2, 1, objective)
    whole = tiny.gradient(config, model, batch)
    halved = dataclasses.replace(
        config, mtp=dataclasses.replace(config.mtp, measure="cross_fitted")
    )
    got = tiny.gradient(halved, model, batch, build_calibration(config.mtp, 2))
    tokens = np.asarray(batch.response_mask).sum(axis=1)
    assert tokens[:2].sum() != tokens[2:].sum()
    tiny.close(got.gradient, whole.gradient, 1e-12)
    crossed = tiny.gradient(halved, model, batch)
    np.testing.assert_allclose(crossed.gram, whole.gram, rtol=1e-10)
    tiny.close(crossed.main.metrics, whole.main.metrics, 1e-10)
    halves = [
        tiny.gradient(config, model, take_rows(batch, rows)).gram
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert not np.allclose(crossed.calibration.gram[0, 1], whole.gram[0, 1], rtol=1e-3)
    assert not np.allclose(crossed.calibration.gram[0, 1], np.mean(halves, axis=0)[0, 1], rtol=1e-3)
    np.testing.assert_allclose(crossed.calibration.gram[1:, 1:], whole.gram[1:, 1:], rtol=1e-10)


@pytest.mark.slow
def test_a_subset_of_rows_is_measured_before_the_backward_pass(x64):
    mtp = MTPTrainingConfig(
        measure="row_subset", measure_options={"fraction": 0.5}, placement="fused"
    )
    config, model, batch = setup(mtp)
    got = tiny.gradient(config, model, batch)
    exact = dataclasses.replace(config, mtp=regime("occ"))
    expected = tiny.gradient(exact, model, take_rows(batch, slice(0, 2)))
    np.testing.assert_allclose(got.calibration.gram, expected.gram, rtol=1e-10)
    weight = float(expected.calibration.weights[1])
    fixed = MTPTrainingConfig(rule="fixed", coefficient=weight, placement="fused")
    same = tiny.gradient(dataclasses.replace(config, mtp=fixed), model, batch)
    tiny.close(got.gradient, same.gradient, 1e-12)


@pytest.mark.release
def test_the_readout_is_head_and_final_norm(x64):
    """Untied, with a module that has no norm of its own, so that both losses reach both."""
    mtp = MTPTrainingConfig(measure="readout", placement="fused")
    config, model, batch = setup(mtp, tied_embeddings=False, mtp={"own_final_norm": False})
    got = tiny.gradient(config, model, batch).calibration.gram
    select = measures.named("output_head", "final_norm")
    exact = dataclasses.replace(config, mtp=regime("occ"))
    calibration = dataclasses.replace(
        build_calibration(exact.mtp, 1), measure=measures.gradients(select)
    )
    expected = tiny.gradient(exact, model, batch, calibration).calibration.gram
    # The embedding belongs to the readout too: module 1 reads it without the trunk between.
    assert got[0, 1] == pytest.approx(float(expected[0, 1]), rel=1e-10)
    assert got[1, 1] > expected[1, 1]


@pytest.mark.release
def test_first_layer_and_embedding_are_parts_of_the_whole(x64):
    grams = {}
    for measure in ("gradients", "first_layer", "last_layer", "embedding"):
        config, model, batch = setup(MTPTrainingConfig(measure=measure))
        grams[measure] = tiny.gradient(config, model, batch).calibration.gram
    parts = [np.asarray(grams[name]) for name in ("first_layer", "last_layer", "embedding")]
    # Two layers and a tied embedding: only the final norm is missing.
    total = np.asarray(grams["gradients"])
    missing = total - sum(parts)
    assert 0 < missing[0, 0] < 0.05 * total[0, 0]
    assert abs(missing[1, 1]) < 1e-12 * total[1, 1]  # the module has a final norm of its own
    assert len({float(part[0, 1]) for part in parts}) == 3


@pytest.mark.release
@pytest.mark.parametrize("placement", ["exact", "fused"])
def test_only_every_second_step_measures(x64, placement):
    """A step in between takes the held weight, and is a fused one: it has no true matrix."""
    mtp = MTPTrainingConfig(
        measure="gradients" if placement == "exact" else "readout", placement=placement, every=2
    )
    config, model, batch = setup(mtp)
    calibration = build_calibration(mtp, 1)
    first = tiny.gradient(config, model, batch)
    once = tiny.gradient(
        dataclasses.replace(config, mtp=dataclasses.replace(mtp, every=1)), model, batch
    )
    tiny.close(first.gradient, once.gradient, 1e-12)
    weight = float(first.calibration.weights[1])
    assert weight != 0

    other = tiny.minibatch(config, model, seed=5)
    step = jax.jit(lambda state: tiny.step_gradient_of(config, model, other, calibration, state))
    held = step(first.calibration)
    assert float(held.calibration.weights[1]) == weight and int(held.calibration.count) == 2
    fixed = MTPTrainingConfig(rule="fixed", coefficient=weight, placement="fused")
    same = tiny.gradient(dataclasses.replace(config, mtp=fixed), model, other)
    tiny.close(held.gradient, same.gradient, 1e-12)
    if placement == "exact":
        assert np.isnan(held.gram).all() and np.isfinite(first.gram).all()
    third = step(held.calibration)
    assert float(third.calibration.weights[1]) != weight


@pytest.mark.standard_promotion
def test_the_second_moment_is_adams_without_its_bias():
    config = OptimizerConfig(learning_rate=1e-3, b2=0.9)
    optimizer = build_optimizer(config)
    params = {"layers": jnp.ones(3), "mtp": jnp.ones(2)}
    gradient = jax.tree.map(lambda x: 1e-3 * jnp.arange(1.0, x.size + 1), params)
    state = optimizer.init(params)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 1), second_moment(state, config))
    for _ in range(3):
        _, state = optimizer.update(gradient, state, params)
    got = second_moment(state, config)
    jax.tree.map(lambda a, g: np.testing.assert_allclose(a, g**2, rtol=1e-5), got, gradient)
    assert optax.tree.norm(got) > 0


@pytest.mark.parametrize(
    "measure",
    [
        "preconditioned",
        pytest.param("preconditioned_euclidean", marks=pytest.mark.release),
        pytest.param("sketched", marks=pytest.mark.release),
    ],
)
def test_the_other_measures_run_in_the_train_step(x64, measure):
    config, model, batch = setup(MTPTrainingConfig(measure=measure, smoothing=0.5))
    _, params, _ = model
    moments = jax.tree.map(lambda x: jnp.square(x) + 1e-4, params)
    calibration = build_calibration(config.mtp, 1)
    got = jax.jit(
        lambda state: tiny.step_gradient_of(config, model, batch, calibration, state, moments)
    )(calibration.init(params))
    assert np.isfinite(got.calibration.weights).all() and float(got.calibration.weights[1]) != 0
    assert not np.allclose(got.calibration.gram, got.gram, rtol=1e-3)


def test_a_measure_that_comes_too_late_is_refused():
    for measure in ("first_layer", "cross_fitted", "sketched"):
        with pytest.raises(ValueError, match=r"placement='fused'.*row_subset"):
            MTPTrainingConfig(measure=measure, placement="fused")
    for measure in ("readout", "row_subset"):
        with pytest.raises(ValueError, match=r"has no need of. Use placement='fused'"):
            MTPTrainingConfig(measure=measure)
    with pytest.raises(ValueError, match="measure must be one of"):
        MTPTrainingConfig(measure="exact")
    with pytest.raises(ValueError, match="every must be > 0"):
        MTPTrainingConfig(every=0)
