"""The whole training objective against loops over tokens: value, gradient and metrics of a step.

`make_train_step` is called as a run calls it. Its gradient is Adam's first moment without decay,
which is the gradient itself, since no norm reaches the clip. What stands where no token counts is
not a number, so that it cannot be read unseen.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from occ.calibration import condition_number
from occ.objectives.policy import PolicyConfig, gmpo, gspo
from occ.training.batch import Minibatch, positions_from_segments
from occ.training.config import (
    LayoutConfig,
    MTPTrainingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
)
from occ.training.regimes import regime
from occ.training.step import make_train_step
from tests import reference_losses, reference_models, reference_step, tiny

pytestmark = pytest.mark.standard_promotion

TWO, ONE = reference_models.small_config(2), reference_models.small_config(1)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, b1=0.0, clip_norm=1e9)
# Two sequences a row, prompts of 1 to 3 tokens, padding on either side and a sequence that counts
# no token.
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2],
        [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2],
    ]
)
RESPONSE = np.array(
    [
        [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    ],
    bool,
)
# One left-padded sequence a row, all prompts within the first four columns.
PLAIN = np.where(np.arange(12)[None] < np.array([[0], [2], [1], [3]]), 0, 1)
ANSWERS = (np.arange(12)[None] >= 4) & (np.arange(12)[None] < np.array([[12], [9], [11], [6]]))
PROMPT_COLUMNS = 4
CLIPS = PolicyConfig(clip_low=0.2, clip_high=0.35, dual_clip=2.0)
OBJECTIVES = {
    "ppo": ObjectiveConfig(
        CLIPS,
        kl_coefficient=0.3,
        kl_estimator="k3",
        entropy_coefficient=0.2,
        importance_cap=1.3,
    ),
    "gspo": ObjectiveConfig(
        gspo(0.1, 0.15),
        aggregation="seq-mean-token-mean",
        kl_coefficient=0.2,
        kl_estimator="k1",
        importance_cap=1.5,
    ),
    "cispo": ObjectiveConfig(
        dataclasses.replace(CLIPS, kind="cispo", log_ratio_clamp=0.35),
        aggregation="seq-mean-token-sum",
        kl_coefficient=0.1,
        kl_estimator="k2",
        entropy_coefficient=0.1,
        importance_cap=1.2,
    ),
    "reinforce": ObjectiveConfig(
        PolicyConfig(kind="reinforce"),
        aggregation="constant-length",
        constant_length=7,
        kl_coefficient=0.15,
        kl_estimator="abs",
        importance_cap=0.9,
    ),
    "clamped": ObjectiveConfig(
        PolicyConfig(clip_low=0.1, clip_high=0.5, dual_clip=None, log_ratio_clamp=0.5),
        aggregation="seq-mean-token-mean",
        entropy_coefficient=0.4,
        importance_cap=1.1,
    ),
    "gmpo": ObjectiveConfig(
        gmpo(0.3),
        aggregation="seq-mean-token-mean",
        kl_coefficient=0.2,
        kl_in_reward=True,
        importance_cap=1.4,
    ),
    "sapo": ObjectiveConfig(
        PolicyConfig(kind="sapo", positive_temperature=0.9, negative_temperature=1.3),
        aggregation="seq-mean-token-mean",
        entropy_coefficient=0.1,
    ),
    "unweighted": ObjectiveConfig(dataclasses.replace(CLIPS, dual_clip=None)),
}


def minibatch(model_config, seed=0, segments=SEGMENTS, response=RESPONSE):
    """Every log-prob differs from every other, and NaN stands where there is no response token."""
    graphdef, params, rest = reference_models.random_model(model_config)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model_config.vocab_size, segments.shape)
    tokens, segment_ids = (jnp.asarray(x, jnp.int32) for x in (tokens, segments))
    layout = tokens, positions_from_segments(segment_ids), segment_ids
    logits = np.asarray(reference_step.logits_of(graphdef, params, rest, layout))

    def spoiled(values):
        return jnp.asarray(np.where(response, values, np.nan))

    def drifted(depth, spread):
        found = np.zeros(segments.shape)
        for row, time in zip(*np.nonzero(response), strict=True):
            if time > depth:
                scores = logits[depth, row, time - depth - 1]
                found[row, time] = reference_losses.log_softmax(scores)[tokens[row, time]]
        return found + spread * rng.normal(size=segments.shape)

    old, by_modules = drifted(0, 0.6), [drifted(k, 0.6) for k in range(1, len(logits))]
    advantages = np.where(segments == 2, -1.0, 0.8) + 0.5 * rng.normal(size=segments.shape)
    return Minibatch(
        tokens=tokens,
        segment_ids=segment_ids,
        positions=layout[1],
        response_mask=jnp.asarray(response),
        advantages=spoiled(advantages),
        old_log_prob=spoiled(old),
        old_mtp_log_prob=jnp.stack([spoiled(old) for old in by_modules]),
        rollout_log_prob=spoiled(old + 0.4 * rng.normal(size=segments.shape)),
        reference_log_prob=spoiled(drifted(0, 0.8)),
    )


def logits_of(model_config, batch):
    layout = batch.tokens, batch.positions, batch.segment_ids
    return np.asarray(
        reference_step.logits_of(*reference_models.random_model(model_config), layout)
    )


PACKED = {"pack": True, "sequences_per_row": 2}


def config_of(mtp, objective="ppo", model=TWO, cut=None, **changes):
    """Packed, but for a measure over all positions, which packing would change."""
    packed = {} if mtp.measure == "released_unmasked" else PACKED
    layout = LayoutConfig(**(packed | (cut or {})))
    changes = {"objective": OBJECTIVES[objective], "optimizer": OPTIMIZER} | changes
    return tiny.train_config(mtp, model, layout=layout, **changes)


def batch_for(config, seed=0):
    """Two sequences a row, or one where the configuration says so."""
    if config.layout.pack:
        return minibatch(config.model, seed)
    return minibatch(config.model, seed, PLAIN, ANSWERS & (PLAIN > 0))


def cut(micro_batches=1, logits_chunk=0):
    return {"cut": {"micro_batches": micro_batches, "logits_chunk": logits_chunk}}


def gradient_of(state):
    """The last gradient, as Adam saw it."""

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    (adam,) = (s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    return reference_step.by_path(adam.mu)


def assert_step(metrics, gradient, expected, tolerance=1e-11):
    """Norm-wise a leaf, and a metric."""
    assert set(gradient) == set(expected.gradient)
    for path, leaf in expected.gradient.items():
        error, size = np.linalg.norm(gradient[path] - leaf), np.linalg.norm(leaf)
        assert error <= tolerance * size, (path, error, size)
    others = {"learning_rate", "skipped", "nonfinite_leaf", "nonfinite_parameter"}
    named = {name for name in metrics if name not in others and not name.startswith("alarm/")}
    assert named == set(expected.metrics)
    for name, value in expected.metrics.items():
        got = np.asarray(metrics[name], np.float64)
        np.testing.assert_allclose(got, value, rtol=10 * tolerance, atol=1e-13, err_msg=name)
    for name in metrics:
        assert not (name.startswith("alarm/") and np.any(metrics[name])), name


def check(config, batches, **options):
    """The train step on these minibatches, one after the other, and the reference beside it."""
    model = reference_models.random_model(config.model)
    train_step = jax.jit(make_train_step(config, **options))
    state, memory = tiny.state(config, model), None
    for number, batch in enumerate(batches):
        before = state.params
        columns = options.get("prompt_columns", 0)
        model_now = model[0], before, state.rest
        expected = reference_step.step(config, model_now, batch, memory, columns)
        memory = expected.memory
        state, metrics = train_step(state, batch)
        assert_step(metrics, gradient_of(state), expected)
        if number == 0:
            assert_first_update(before, state.params, expected.gradient, config)


def assert_first_update(before, after, gradient, config):
    """Adam's first step goes against the gradient: by -rate g / (|g| + epsilon)."""
    before, after = reference_step.by_path(before), reference_step.by_path(after)
    rate, epsilon = config.optimizer.learning_rate, config.optimizer.adam_epsilon
    for path, g in gradient.items():
        expected = -rate * g / (abs(g) + epsilon)
        error = np.linalg.norm(after[path] - before[path] - expected)
        assert error <= 1e-6 * max(np.linalg.norm(expected), 1e-30), path


POLICY = MTPTrainingConfig(rule="fixed", coefficient=-0.35, placement="fused")
DISTILL = MTPTrainingConfig(loss="distill", own_loss="ce", rule="fixed", coefficient=0.4)
SHARP = {"rollout": RolloutConfig(temperature=0.8)}
SMOOTHED = dataclasses.replace(regime("occ_smoothed"), every=2)
STEPS = {
    "detach": config_of(regime("detach"), "cispo", ONE, **cut(2, 5), **SHARP),
    "occ": config_of(regime("occ"), "ppo"),
}
SLOW = {
    "policy": config_of(dataclasses.replace(POLICY, reference="own"), "clamped"),
    "occ_paper": config_of(regime("occ_paper"), "gspo", ONE, **cut(2)),
    "rl_only": config_of(regime("rl_only"), "ppo", ONE, **cut(logits_chunk=5)),
    "drafter_tv": config_of(regime("drafter_tv"), "ppo", **cut(2, 5)),
    "drafter_top_k": config_of(
        dataclasses.replace(regime("drafter_top_k"), distilled_tokens=3), "ppo", **SHARP
    ),
    "occ_released": config_of(regime("occ_released"), "reinforce", ONE),
    "detach for two": config_of(regime("detach"), "gspo", **SHARP),
    "ce": config_of(regime("ce"), "cispo", **cut(2, 5)),
    "rewarded": config_of(regime("rewarded"), "ppo", **cut(2, 5)),
    "detach exact": config_of(regime("detach", exact=True), "reinforce", **cut(2)),
    "ce exact": config_of(regime("ce", exact=True), "gspo", **cut(1, 5)),
    "policy gspo": config_of(regime("policy"), "gspo", **cut(2, 5)),
    "policy exact": config_of(regime("policy", exact=True), "cispo", **cut(2)),
    "occ in portions": config_of(regime("occ"), "clamped", **cut(4, 5)),
    "occ of gmpo": config_of(regime("occ"), "gmpo", **cut(2, 5)),
    "policy sapo": config_of(regime("policy"), "sapo", ONE, **cut(2, 5)),
    "occ for one": config_of(regime("occ"), "unweighted", ONE),
    "occ in bounds": config_of(dataclasses.replace(regime("occ"), bounds=(-0.01, 0.02))),
    "occ_paper exact": config_of(regime("occ_paper", exact=True), "reinforce"),
    "occ_paper for two": config_of(regime("occ_paper"), "ppo"),
    "occ_released for two": config_of(regime("occ_released"), "unweighted", **cut(2)),
    "occ_released exact": config_of(regime("occ_released", exact=True), "cispo"),
    "untied": config_of(
        regime("occ"), "ppo", reference_models.small_config(2, tied_embeddings=False)
    ),
    "own embedding and head": config_of(
        POLICY,
        "ppo",
        reference_models.small_config(2, mtp={"own_embedding": True, "own_output_head": True}),
    ),
}


@pytest.mark.parametrize(
    "name", [*STEPS, *(pytest.param(name, marks=pytest.mark.release) for name in SLOW)]
)
def test_a_step_is_that_of_the_loops(x64, name):
    config = (STEPS | SLOW)[name]
    check(config, [batch_for(config)])


@pytest.mark.parametrize(
    ("mtp", "model", "chunk"),
    [
        (regime("occ_released"), ONE, 0),  # its mean is over the columns of responses
        *(
            pytest.param(DISTILL, model, chunk, marks=pytest.mark.release)
            for model, chunk in ((ONE, 0), (TWO, 0), (TWO, 3))
        ),
    ],
)
def test_without_the_columns_of_the_prompts(x64, mtp, model, chunk):
    """And the modules' own leaves may learn from another loss than what the shared ones see."""
    config = config_of(mtp, "reinforce", model, {"logits_chunk": chunk, "pack": False})
    check(config, [batch_for(config)], prompt_columns=PROMPT_COLUMNS)


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.release)])
def test_a_step_that_is_not_due_keeps_the_coefficients(x64, parts):
    """Of averages: measured, kept, measured, each on another minibatch."""
    config = config_of(SMOOTHED, "ppo", ONE, **cut(parts))
    check(config, [minibatch(ONE, seed) for seed in range(3)])


REPLAY = MTPTrainingConfig(
    rule="replay", rule_options={"series": [0.5, -0.25]}, every=2, placement="fused"
)


@pytest.mark.release
@pytest.mark.parametrize("placement", ["fused", "exact"])
def test_replay_keeps_its_coefficient_too(x64, placement):
    config = config_of(dataclasses.replace(REPLAY, placement=placement), "ppo", ONE)
    check(config, [minibatch(ONE, seed) for seed in range(3)])


@pytest.mark.release
def test_replay_in_micro_batches_keeps_its_coefficient_too(x64):
    config = config_of(REPLAY, "ppo", ONE, **cut(2))
    check(config, [minibatch(ONE, seed) for seed in range(3)])


def test_a_ratio_has_no_condition_number():
    """`condition_number` promises NaN without a Gram matrix."""
    assert np.isnan(condition_number(jnp.full((2, 2), jnp.nan)))
    assert np.isnan(condition_number(jnp.full((3, 3), jnp.nan)))


# -- the reference itself -------------------------------------------------------------------------


def test_the_minibatch_has_tokens_in_every_branch(x64):
    """Else a branch could be wrong unseen."""
    batch = minibatch(TWO)
    logits, response = logits_of(TWO, batch), np.asarray(batch.response_mask)
    for name in OBJECTIVES:
        config = config_of(regime("policy"), name)
        for k, loss in enumerate(reference_losses.losses(logits, batch, config)):
            met = {
                key.split("_")[-1]: value for key, value in loss.metrics.items() if "clip" in key
            }
            wanted = {
                "high": name not in ("reinforce", "sapo"),
                "low": name not in ("reinforce", "sapo"),
                "dual": name == "ppo",
            }
            assert {side: value > 0 for side, value in met.items()} == wanted, (name, k)
    weights = np.exp(batch.old_log_prob - batch.rollout_log_prob)[response]
    for objective in OBJECTIVES.values():
        if objective.importance_cap is not None:
            assert 0 < np.mean(weights > objective.importance_cap) < 1
    loss = reference_losses.losses(logits, batch, config_of(POLICY, "unweighted"))[0]
    beyond = abs(loss.log_ratio[response]) > OBJECTIVES["clamped"].policy.log_ratio_clamp
    assert 0 < np.mean(beyond) < 1


@pytest.mark.parametrize(
    "loss", ["policy", "ce", "ce_rewarded", "distill", "distill_top_k", "total_variation"]
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_slopes_of_the_reference_by_central_differences(x64, name, loss):
    """Along random directions of all logits; constants of differentiation are held."""
    batch = minibatch(TWO)
    logits = logits_of(TWO, batch)
    mtp = MTPTrainingConfig(loss=loss, reference="own", distilled_tokens=3)
    config = config_of(mtp, name, **SHARP)
    slopes = reference_losses.losses(logits, batch, config)
    rng, step = np.random.default_rng(1), 1e-6
    for _ in range(3):
        direction = rng.normal(size=logits.shape)
        ahead, behind = (
            reference_losses.losses(logits + sign * step * direction, batch, config, held=logits)
            for sign in (1, -1)
        )
        for k, slope in enumerate(slopes):
            expected = (ahead[k].value - behind[k].value) / (2 * step)
            got = np.sum(slope.cotangent * direction[k])
            assert abs(got - expected) < 1e-7, (k, got, expected)
