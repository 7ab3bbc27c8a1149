"""The train step: trajectories bit for bit, alarms, skipped steps, clipping, decay, balancing."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from occ.models.config import MoEConfig
from occ.models.parameters import is_shared
from occ.models.policy import abstract_policy
from occ.training import metrics, regimes
from occ.training.batch import split
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    MTPTrainingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainedConfig,
    RolloutConfig,
    WarmStartConfig,
)
from occ.training.optimizer import build_optimizer, is_matrix, learning_rate_schedule
from occ.training.regimes import REGIMES, regime
from occ.training.step import make_train_step
from tests import tiny

pytestmark = pytest.mark.standard_promotion

DECAYING = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, clip_norm=0.3)


@pytest.fixture
def optimized():
    """With XLA's optimisations, as users run it; other tests save time without them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


_COMPILED: dict = {}


def stepper(config, model):
    key = repr(config), model[0]
    if key not in _COMPILED:
        _COMPILED[key] = jax.jit(make_train_step(config))
    return _COMPILED[key]


def trajectory(mtp, steps, optimizer=DECAYING):
    """Parameters after training on fixed batches."""
    model_config = tiny.model_config()
    model = tiny.build_model(model_config)
    config = tiny.train_config(mtp, model_config, optimizer=optimizer)
    batches = [tiny.minibatch(config, model, seed) for seed in range(4)]
    state = tiny.state(config, model)
    as_users = {} if jax.config.read("jax_disable_most_optimizations") else tiny.AS_USERS
    step = jax.jit(make_train_step(config), compiler_options=as_users)
    for number in range(steps):
        state, metrics = step(state, batches[number % 4])
    assert metrics["skipped"] == 0
    return state.params, metrics


def shared(params):
    return {name: tree for name, tree in params.items() if is_shared(name)}


@pytest.mark.release
def test_coefficient_zero_is_training_the_modules_alone_for_50_steps(optimized):
    zero = dataclasses.replace(regime("occ_paper"), scale=0.0)
    alone = MTPTrainingConfig(loss="policy", rule="detach", placement="fused")
    occ, _ = trajectory(zero, 50)
    modules_only, _ = trajectory(alone, 50)
    chex.assert_trees_all_equal(occ, modules_only)
    calibrated, metrics = trajectory(regime("occ_paper"), 50)
    assert metrics["occ/coefficient"][0] != 0
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(calibrated, modules_only)


@pytest.mark.release
def test_detach_moves_the_trunk_as_rl_alone_for_50_steps(optimized):
    detached, _ = trajectory(regime("detach"), 50)
    alone, _ = trajectory(regime("rl_only"), 50)
    chex.assert_trees_all_equal(shared(detached), shared(alone))
    model = tiny.build_model(tiny.model_config())
    chex.assert_trees_all_equal(alone["mtp"], model[1]["mtp"])  # untrained, and not decayed
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(detached["mtp"], alone["mtp"])


@pytest.mark.slow
def test_one_norm_for_all_lets_the_modules_shrink_the_policys_step():
    together = dataclasses.replace(DECAYING, clip_groups="together")
    detached, _ = trajectory(regime("detach"), 2, together)
    alone, _ = trajectory(regime("rl_only"), 2, together)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(shared(detached), shared(alone))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.release] * (name not in ("rl_only", "occ", "drafter"))
        )
        for name in REGIMES
    ],
)
def test_metrics_are_there_and_finite(name):
    _, metrics = trajectory(regime(name), 1)
    expected = {
        "loss/rl",
        "policy/clip_high",
        "policy/clip_low",
        "policy/kl_to_old",
        "policy/entropy",
        "grad_norm/shared",
        "grad_norm/own",
        "learning_rate",
        "skipped",
        "batch/tokens",
    }
    if name != "rl_only":
        expected |= {
            "loss/mtp",
            "mtp/cross_entropy",
            "occ/correlation",
            "occ/perturbation",
            "occ/cosine",
            "occ/coefficient",
            "alarm/no_module_gradient",
        }
        assert not np.any(metrics["alarm/no_module_gradient"])
        assert not np.any(metrics["alarm/module_unchanged"])
        assert metrics["occ/coefficient"].shape == (1,)
    if name == "occ":
        expected |= {"true/correlation", "true/perturbation", "true/cosine", "grad_norm/rl"}
        np.testing.assert_allclose(metrics["occ/coefficient"], metrics["true/ratio"], rtol=1e-4)
    assert expected <= set(metrics)
    unknown = {"occ/correlation", "occ/perturbation", "occ/cosine", "occ/condition_number"}
    for key, value in metrics.items():
        # The released code's mean of ratios has no c and no v^2.
        if not (name == "occ_released" and key in unknown):
            assert np.all(np.isfinite(value)), key


def one_step(config, model, batch):
    before = tiny.state(config, model)
    return before, *stepper(config, model)(before, batch)


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    model_config = tiny.model_config()
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("occ_paper"), model_config, optimizer=DECAYING)
    batch = tiny.minibatch(config, model)
    bad = batch.replace(advantages=jnp.where(batch.response_mask, jnp.inf, 0))
    before, after, metrics = one_step(config, model, bad)
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.opt_state, before.opt_state)
    assert after.step == 1 and metrics["skipped"] == 1
    assert not np.any(metrics["alarm/module_unchanged"])  # a skipped step is no fault of wiring
    state, _ = stepper(config, model)(after, batch)
    assert state.skipped == 1
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(state.params, before.params)


def test_alarms():
    model_config = tiny.model_config()
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("policy"), model_config)
    batch = tiny.minibatch(config, model)
    # Ratios far above the clip with positive advantages: no token has a gradient.
    clipped = batch.replace(
        old_log_prob=batch.old_log_prob - 9, advantages=jnp.abs(batch.advantages)
    )
    silent = batch.replace(advantages=jnp.zeros_like(batch.advantages))
    masked = batch.replace(response_mask=jnp.zeros_like(batch.response_mask))
    for given, expected in ((batch, (0, 0)), (clipped, (1, 0)), (silent, (0, 0)), (masked, (0, 1))):
        _, _, metrics = one_step(config, model, given)
        got = metrics["alarm/no_module_gradient"][0], metrics["alarm/all_targets_masked"][0]
        assert tuple(map(int, got)) == expected


def test_an_unchanged_module_raises_the_alarm():
    """A learning rate so small that float32 parameters cannot move."""
    model_config = tiny.model_config()
    model = tiny.build_model(model_config)
    config = tiny.train_config(
        regime("detach"), model_config, optimizer=OptimizerConfig(learning_rate=1e-30)
    )
    _, _, metrics = one_step(config, model, tiny.minibatch(config, model))
    assert metrics["alarm/module_unchanged"].tolist() == [True]


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_only_what_the_mask_names_decays(decay):
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decay=decay)
    model_config = tiny.model_config(
        qkv_bias=True, moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=8)
    )
    shapes = abstract_policy(model_config).params
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    optimizer = build_optimizer(config)

    @jax.jit
    def stepped(params):
        nothing = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(nothing, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    moved = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(stepped(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.all(np.isclose(leaf, 0.95)) or np.all(np.asarray(leaf) == 1), name
        if np.asarray(leaf).flat[0] != 1:
            moved.add(name)
        else:
            assert name.split("/")[-1] in ("scale", "bias"), name
    everything = len(jax.tree.leaves(params))
    assert len(moved) == everything if decay == "all" else 0 < len(moved) < everything
    assert is_matrix("layers/mlp/router") and not is_matrix("layers/attention/query/bias")


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.slow), 0.25])
def test_router_bias_moves_against_the_load_and_not_otherwise(rate):
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_width=8)
    model_config = tiny.model_config(0, moe=moe)
    model = tiny.build_model(model_config)
    optimizer = dataclasses.replace(DECAYING, router_bias_rate=rate)
    config = tiny.train_config(regime("rl_only"), model_config, optimizer=optimizer)
    before, after, _ = one_step(config, model, tiny.minibatch(config, model))
    old = before.rest["layers"]["mlp"]["router_bias"]
    new = after.rest["layers"]["mlp"]["router_bias"]
    assert set(np.unique(np.abs(new - old))) <= {0.0, rate}
    assert np.any(new != old) == (rate > 0)


def test_learning_rate_warms_up_to_its_peak():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4))
    np.testing.assert_allclose([schedule(i) for i in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("describe", [metrics.describe, regimes.describe])
def test_tables_of_names_have_as_many_cells_in_every_row(describe):
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in describe().splitlines()}
    assert len(counts) == 1


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": jnp.zeros((4,), jnp.int32)}, r"expected \[B, T\].*got \(4,\)"),
        ({"tokens": jnp.zeros((0, 9), jnp.int32)}, "at least one token"),
        ({"advantages": jnp.zeros((4, 1))}, r"advantages: expected floating \(4, 9\).*\(4, 1\)"),
        ({"response_mask": jnp.ones((4, 9))}, "response_mask: expected bool"),
        ({"old_mtp_log_prob": jnp.zeros((2, 4, 9))}, r"old_mtp.*\(1, 4, 9\).*1 MTP modules"),
    ],
)
def test_a_minibatch_that_does_not_fit_is_refused(unchecked, changes, message):
    model_config = tiny.model_config()
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("detach"), model_config)
    batch = tiny.minibatch(config, model).replace(**changes)
    with pytest.raises(ValueError, match=message):
        one_step(config, model, batch)


def test_a_rollout_is_cut_evenly_or_not_at_all():
    model_config = tiny.model_config()
    config = tiny.train_config(regime("detach"), model_config)
    batch = tiny.minibatch(config, tiny.build_model(model_config))
    first, second = split(batch, 2)
    assert first.old_mtp_log_prob.shape == (1, 2, 9)
    np.testing.assert_array_equal(jnp.concatenate([first.tokens, second.tokens]), batch.tokens)
    with pytest.raises(ValueError, match="4 sequences cannot be cut into 3"):
        split(batch, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MTPTrainingConfig(placement="fused", measure="gradients"),
            "Use placement='exact', or a measure in .*'log_ratios'",
        ),
        (lambda: MTPTrainingConfig(rule="best"), "rule must be one of .*'best'"),
        (lambda: regime("occ2"), "expected one of .*got 'occ2'"),
        (
            lambda: tiny.run_config("x", rollout=RolloutConfig(prompts=8, samples=1)),
            "a group of one has nothing to compare",
        ),
        (
            lambda: MTPTrainingConfig(groups="layer", measure="first_layer"),
            "a measure that is not in .*'first_layer', 'last_layer', 'embedding'",
        ),
        (
            lambda: tiny.run_config(
                "x",
                mtp=MTPTrainingConfig(measure="cross_fitted"),
                rollout=RolloutConfig(prompts=6, samples=4, minibatches=2),
            ),
            "compares the first 6 of a minibatch's 12 sequences .* among the 4 samples",
        ),
        (lambda: ObjectiveConfig(gamma=0.9), "only advantage='reinforce..-tokens' looks at"),
        (lambda: ObjectiveConfig(kl_in_reward=True), "moves the KL term, and kl_coefficient=0"),
        (lambda: RolloutConfig(prompts=0), "prompts must be > 0, got 0"),
        (lambda: RolloutConfig(prompts=6, minibatches=4), "must be a multiple of minibatches"),
        (lambda: OptimizerConfig(clip_groups="one"), "clip_groups must be one of"),
        (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm must be > 0"),
        (lambda: OptimizerConfig(b2=2.0), r"OptimizerConfig.b2 must be in \[0, 1\), got 2.0"),
        (lambda: OptimizerConfig(learning_rate=-1e-3), "learning_rate must be >= 0, got -0.001"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate must be float, got n"),
        (lambda: OptimizerConfig(warmup_steps=1.5), "warmup_steps must be int, got 1.5"),
        (lambda: OptimizerConfig(learning_rate=True), "learning_rate must be float, got True"),
        (lambda: EvaluationConfig(every=0), "EvaluationConfig.every must be > 0, got 0"),
        (lambda: EvaluationConfig(samples="4"), "EvaluationConfig.samples must be int, got '4'"),
        (lambda: ObjectiveConfig(advantage="foo"), "advantage must be one of .*got 'foo'"),
        (lambda: ObjectiveConfig(kl_clamp=0.0), "kl_clamp must be > 0, got 0.0"),
        (lambda: LayoutConfig(pack=1), "LayoutConfig.pack must be bool, got 1"),
        (lambda: MTPTrainingConfig(smoothing=1.0), r"smoothing must be in \[0, 1\), got 1.0"),
        (lambda: MTPTrainingConfig(measure="best"), "measure must be one of .*'best'"),
        (lambda: MTPTrainingConfig(measure_options={"rank": 2}), "no option .'rank'"),
        (lambda: MTPTrainingConfig(rule="pcgrad", rule_options={"x": 1}), "no option .'x'"),
        (lambda: WarmStartConfig(wrong_fraction=1.5), r"wrong_fraction must be in \[0, 1\]"),
        (lambda: PretrainedConfig("folder", attach="none"), "attach must be one of"),
        (lambda: tiny.run_config("x", rollouts=0), "TrainConfig.rollouts must be > 0, got 0"),
        (lambda: tiny.run_config("x", task=3), "TrainConfig.task must be str, got 3"),
        (lambda: tiny.run_config("x", mtp="occ"), "mtp must be MTPTrainingConfig, got 'occ'"),
        (lambda: ObjectiveConfig(constant_length=4), "goes with aggregation='constant-length'"),
        (
            lambda: tiny.train_config(regime("occ"), tiny.model_config(0)),
            "K = 0 modules. Give the model modules .* or train with regime\\('rl_only'\\)",
        ),
    ],
)
def test_configurations_that_cannot_work_are_refused(unchecked, build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("mtp", "logits_chunk"),
    [
        pytest.param(regime("occ"), 0, marks=pytest.mark.release),
        pytest.param(
            dataclasses.replace(regime("ce"), loss="distill"), 2, marks=pytest.mark.release
        ),
    ],
)
def test_columns_that_hold_prompts_alone_can_be_left_out_of_the_head(mtp, logits_chunk):
    model_config = tiny.model_config(2, dtype="float64")
    with jax.enable_x64(True):
        model = tiny.build_model(model_config)
        layout = LayoutConfig(logits_chunk=logits_chunk)
        config = tiny.train_config(mtp, model_config, layout=layout)
        batch = tiny.minibatch(config, model)
        first = int(np.flatnonzero(np.asarray(batch.response_mask).any(axis=0))[0])
        assert first > 2  # columns that the heads can leave out

        def step(columns):
            run = jax.jit(make_train_step(config, prompt_columns=columns))
            state, metrics = run(tiny.state(config, model), batch)
            found = state.calibration, metrics["loss/rl"], metrics["loss/mtp"], state.opt_state
            return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), found)

        whole = step(0)
        tiny.close(step(first), whole, 1e-12)
        with pytest.raises(AssertionError):
            tiny.close(step(first + 1), whole, 1e-12)
