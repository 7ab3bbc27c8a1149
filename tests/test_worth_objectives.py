"""The objectives whose worth is measured, against loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import worth_objectives as objectives
from experiments.studies.fidelity_estimators import shared_gradients
from occ.objectives import divergences
from occ.objectives.advantages import optimal_token_baseline
from occ.training.config import MTPTrainingConfig, RolloutConfig
from occ.training.gradient.inputs import step_inputs
from occ.training.gradient.placement import loss_gradients
from tests import tiny

pytestmark = pytest.mark.usefixtures("x64")

GROUPS, SAMPLES, TEMPERATURE = 2, 3, 0.7


@pytest.fixture(scope="module")
def measured():
    """A model of two modules in float64, and what a step reads of six samples of two prompts."""
    with jax.enable_x64(True):
        config = tiny.train_config(
            objectives.OWN,
            tiny.model_config(2, "float64"),
            rollout=RolloutConfig(
                prompts=GROUPS, samples=SAMPLES, minibatches=1, temperature=TEMPERATURE
            ),
        )
        model = tiny.build_model(config.model)
        batch = tiny.minibatch(config, model, rows=GROUPS * SAMPLES, drift=0.0)
        signs = np.array([1.0, 0.7, -1.7, 2.0, -1.0, -1.0])[:, None]
        batch = batch.replace(
            advantages=jnp.asarray(np.where(batch.response_mask, signs, 0.0)),
        )
        return step_inputs(tiny.policy(config, model), batch, config)


def test_a_module_alone_and_all_together(measured):
    config = dataclasses.replace(measured.config, mtp=objectives.OWN)
    main, first, second = shared_gradients(loss_gradients(measured._replace(config=config)))
    tiny.close(objectives.rl_gradient(measured), main, 1e-12)
    tiny.close(objectives.AUXILIARIES["policy_own_2"].gradient(measured), second, 1e-12)
    both = jax.tree.map(jnp.add, first, second)
    tiny.close(objectives.AUXILIARIES["policy_own"].gradient(measured), both, 1e-12)
    variation = dataclasses.replace(measured.config, mtp=MTPTrainingConfig(loss="total_variation"))
    _, *heads = shared_gradients(loss_gradients(measured._replace(config=variation)))
    found = objectives.AUXILIARIES["total_variation"].gradient(measured)
    tiny.close(found, jax.tree.map(jnp.add, *heads), 1e-12)


def test_cross_entropy_weighted_by_an_exponential(measured):
    """On the policy's own samples the ratio is 1, so that the policy loss is -A log p."""
    batch = measured.batch
    old = [scores.log_prob for scores in measured.stages.score(measured.stages.policy.params)]
    now = batch.replace(old_log_prob=old[0], old_mtp_log_prob=jnp.stack(old[1:]))
    plain = objectives.AUXILIARIES["ce"].gradient(measured)

    def weighted(weights):
        logs = jnp.broadcast_to(jnp.log(weights)[:, None], batch.advantages.shape)
        inputs = measured.on(now.replace(advantages=logs))
        return objectives.AUXILIARIES["ce_weighted"].gradient(inputs)

    ones = jnp.ones(GROUPS * SAMPLES)
    tiny.close(weighted(ones), plain, 1e-10)
    # Linear in the weights of the rows, whichever of them is the largest.
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.uniform(0.1, 3, GROUPS * SAMPLES))
    b = a[::-1]
    assert jnp.argmax(a) != jnp.argmax(b)
    tiny.close(weighted(a + b), jax.tree.map(jnp.add, weighted(a), weighted(b)), 1e-10)


def test_energy_is_the_squared_gradient_of_a_log_prob():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)))
    labels = jnp.array([0, 3, 6, 3])
    slopes = jax.vmap(jax.grad(lambda row, label: jax.nn.log_softmax(row)[label]))(logits, labels)
    found = divergences.logit_energy(logits, labels)
    np.testing.assert_allclose(found, jnp.sum(slopes**2, axis=-1), rtol=1e-12)


def test_baseline_of_least_variance_is_the_loops():
    rng = np.random.default_rng(1)
    returns, energy = rng.normal(size=(2, 3, 5)), rng.uniform(0.1, 1, size=(2, 3, 5))
    mask = np.arange(5) < np.array([[5, 3, 1], [2, 2, 4]])[:, :, None]
    mask[:, :, 0] = False  # a prompt
    found = optimal_token_baseline(*map(jnp.asarray, (returns, energy, mask)))
    for p in range(2):
        for t in range(5):
            W = [np.sum((energy * mask)[p, i, : t + 1]) * mask[p, i, t] for i in range(3)]
            expected = np.dot(W, returns[p, :, t]) / sum(W) if sum(W) else 0.0
            np.testing.assert_allclose(found[p, :, t], expected, rtol=1e-12)
    # It minimises the sum of W (R - b)^2, and is the group's mean where all energies are equal.
    everywhere = jnp.ones((2, 3, 5), bool)
    even = optimal_token_baseline(jnp.asarray(returns), jnp.ones((2, 3, 5)), everywhere)
    np.testing.assert_allclose(even[:, 0], returns.mean(1), rtol=1e-12)


def test_token_baselines_of_a_minibatch(measured):
    batch, stages, parts = measured.batch, measured.stages, measured.parts
    state = stages.modules(parts, stages.trunk(parts).hidden)[0]
    p = np.asarray(jax.nn.softmax(stages.model(parts).mtp_logits(state, 0) / TEMPERATURE, axis=-1))
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.response_mask)
    segments, advantages = np.asarray(batch.segment_ids), np.asarray(batch.advantages)
    rows, time = tokens.shape
    W, seen = np.zeros((rows, time)), np.zeros((rows, time), bool)
    for r in range(rows):
        total = 0.0
        for t in range(2, time):
            seen[r, t] = mask[r, t] and segments[r, t] == segments[r, t - 2] > 0
            if seen[r, t]:
                here = p[r, t - 2]
                total += 1 - 2 * here[tokens[r, t]] + np.sum(here**2)
                W[r, t] = total
    expected = advantages.copy()
    for first in range(0, rows, SAMPLES):
        group = slice(first, first + SAMPLES)
        weight = W[group].sum(0)
        baseline = (W[group] * advantages[group]).sum(0) / np.where(weight > 0, weight, 1)
        expected[group] -= baseline
    found = objectives._with_token_baseline(measured).advantages
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-10)
    assert np.abs(np.asarray(found - batch.advantages)[seen]).max() > 0.1
    own = objectives.AUXILIARIES["policy_own"]
    expected = own.gradient(measured.on(batch.replace(advantages=found)))
    tiny.close(objectives.AUXILIARIES["policy_otb"].gradient(measured), expected, 1e-12)


def test_losses_of_hidden_states_are_the_loops(measured):
    rng = np.random.default_rng(2)
    batch = measured.batch
    rows, time = batch.tokens.shape
    hidden, state = rng.normal(size=(2, rows, time, 4))
    mask, segments = np.asarray(batch.response_mask), np.asarray(batch.segment_ids)

    def apart(a, b):
        return 1 - a @ b / np.sqrt((a @ a) * (b @ b))

    each = [
        apart(state[r, t - 2], hidden[r, t - 1])
        for r in range(rows)
        for t in range(2, time)
        if mask[r, t] and segments[r, t] == segments[r, t - 2] > 0
    ]
    found = objectives.latent_loss(measured, jnp.asarray(hidden), jnp.asarray(state))
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-10)

    last = [np.flatnonzero(mask[r])[-1] for r in range(rows)]
    better = [r for r in range(rows) if batch.advantages[r, last[r]] > 0]
    assert better == [0, 1, 3]  # one pair in the first group, none in the second
    expected = apart(hidden[0, last[0] - 1], hidden[1, last[1] - 1])
    found = objectives.alignment_loss(measured, jnp.asarray(hidden), jnp.asarray(state))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    target = jax.grad(lambda h: objectives.latent_loss(measured, h, jnp.asarray(state)))
    assert not np.any(target(jnp.asarray(hidden)))  # it is held fixed


@pytest.mark.parametrize("name", ["latent", "alignment"])
def test_gradients_of_hidden_states_reach_the_trunk(measured, name):
    found = objectives.AUXILIARIES[name].gradient(measured)
    assert set(found) == set(objectives.rl_gradient(measured))
    assert all(np.isfinite(leaf).all() for leaf in found.values())
    assert max(float(jnp.abs(leaf).max()) for leaf in found.values()) > 1e-6


def test_better_samples_that_are_the_same_have_nothing_to_align(measured):
    batch = measured.batch
    equal = jax.tree.map(lambda leaf: leaf, batch).replace(
        tokens=batch.tokens.at[1].set(batch.tokens[0]),
        response_mask=batch.response_mask.at[1].set(batch.response_mask[0]),
        segment_ids=batch.segment_ids.at[1].set(batch.segment_ids[0]),
        positions=batch.positions.at[1].set(batch.positions[0]),
        advantages=batch.advantages.at[1].set(batch.advantages[0]),
    )
    found = objectives.AUXILIARIES["alignment"].gradient(measured.on(equal))
    assert max(float(jnp.abs(leaf).max()) for leaf in found.values()) < 1e-9


def test_models_of_settings():
    config = objectives.setting_of("star_easy-parallel_2")
    assert config.model.mtp.kind == "parallel" and config.model.mtp.num_modules == 2
    assert objectives.setting_of("star_easy-width_128").model.width == 128
    objectives.check(("policy_own_3",), ("star_easy-modules_3",))
