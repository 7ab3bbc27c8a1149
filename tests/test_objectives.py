"""Losses and advantages against token-by-token references, hand cases and finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occ.objectives import advantages, divergences, masked, mtp
from occ.objectives.policy import PolicyConfig, gmpo, gspo, policy_loss
from occ.training.config import ADVANTAGES, ObjectiveConfig
from occ.training.credit import token_advantages
from tests import reference_objectives as reference

SEGMENTS = np.array([[0, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 2, 2, 2, 3, 3, 0]])
MASK = np.array(
    [
        [0, 0, 1, 1, 1, 0, 1, 1],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 0, 1, 0, 0, 0],  # the third sequence counts no token
    ],
    bool,
)
POLICIES = {
    "ppo": PolicyConfig(),
    "no dual clip": PolicyConfig(dual_clip=None),
    "tight dual clip": PolicyConfig(dual_clip=1.2),
    "no lower bound": PolicyConfig(clip_low=1.0, clip_high=0.0),
    "clamped": PolicyConfig(log_ratio_clamp=0.4, dual_clip=None),
    "gspo": gspo(0.1, 0.15),
    "gmpo": gmpo(0.3),
    "sapo": PolicyConfig(kind="sapo", positive_temperature=0.8, negative_temperature=1.5),
    "cispo": PolicyConfig(kind="cispo"),
    "reinforce": PolicyConfig(kind="reinforce"),
}


def case(seed=0, spread=0.5, dtype=np.float64):
    """Log-probs, old log-probs and advantages [3, 8], with ratios on both sides of every clip."""
    rng = np.random.default_rng(seed)
    log_prob = rng.normal(-1, 0.4, SEGMENTS.shape).astype(dtype)
    old = (log_prob + rng.normal(0, spread, SEGMENTS.shape)).astype(dtype)
    return log_prob, old, rng.normal(size=SEGMENTS.shape).astype(dtype)


def loss_of(log_prob, old, advantage, config, mode="token-mean", mask=MASK, segments=SEGMENTS):
    segments = jnp.asarray(segments, jnp.int32)
    terms = policy_loss(
        jnp.asarray(log_prob),
        jnp.asarray(old),
        jnp.asarray(advantage),
        jnp.asarray(mask),
        segments,
        config=config,
        sequences_per_row=3,
    )
    total = masked.aggregate(
        terms.loss,
        jnp.asarray(mask),
        segments,
        mode=mode,
        sequences_per_row=3,
        constant_length=7 if mode == "constant-length" else None,
    )
    return total.mean(), terms


# -- policy losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("mode", masked.AGGREGATIONS)
def test_policy_loss_is_the_loop(x64, config, mode):
    log_prob, old, advantage = case()
    got, terms = loss_of(log_prob, old, advantage, config, mode)
    tokens = reference.policy_loss(log_prob, old, advantage, MASK, SEGMENTS, config)
    np.testing.assert_allclose(terms.loss, tokens, rtol=1e-12, atol=1e-15)
    expected = reference.aggregate(tokens, MASK, SEGMENTS, mode, 7)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["ppo", "tight dual clip", "sapo"])
def test_gradient_is_the_finite_difference(x64, kind):
    """PPO's loss, and SAPO's, are what they differentiate; others stop gradients (next test)."""
    log_prob, old, advantage = case(3)
    config = POLICIES[kind]
    gradient = jax.grad(lambda x: loss_of(x, old, advantage, config)[0])(jnp.asarray(log_prob))
    for b, t in np.ndindex(*log_prob.shape):
        values = []
        for step in (1e-6, -1e-6):
            moved = log_prob.copy()
            moved[b, t] += step
            tokens = reference.policy_loss(moved, old, advantage, MASK, SEGMENTS, config)
            values.append(reference.aggregate(tokens, MASK, SEGMENTS, "token-mean"))
        assert gradient[b, t] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["gspo", "cispo", "reinforce"])
def test_gradient_of_the_losses_that_stop_gradients(x64, kind):
    """-weight A a token: the sequence's unclipped ratio (GSPO), the clipped ratio (CISPO), or 1.

    GSPO's true derivative by one token's log-prob carries 1 / |sequence| and reaches every token
    of it; summed over a sequence with one advantage it equals this form, which is checked here.
    """
    log_prob, old, advantage = case(5)
    config = POLICIES[kind]
    per_sequence = np.zeros_like(advantage)
    for number, (row, columns) in enumerate(reference.sequences(SEGMENTS)):
        per_sequence[row, columns] = (-1.0) ** number * (number + 1)
    gradient = jax.grad(lambda x: loss_of(x, old, per_sequence, config, "seq-mean-token-mean")[0])(
        jnp.asarray(log_prob)
    )
    live = [
        (row, [t for t in columns if MASK[row, t]])
        for row, columns in reference.sequences(SEGMENTS)
        if MASK[row, columns].any()
    ]
    expected = np.zeros_like(advantage)
    for row, counted in live:
        mean = np.exp(np.mean([log_prob[row, t] - old[row, t] for t in counted]))
        for t in counted:
            a, ratio = per_sequence[row, t], np.exp(log_prob[row, t] - old[row, t])
            if kind == "gspo":
                inside = mean <= 1.15 if a > 0 else mean >= 0.9
                weight = mean if inside else 0.0
            elif kind == "cispo":
                weight = min(max(ratio, 0.8), 1.28)
            else:
                weight = 1.0
            expected[row, t] = -weight * a / len(counted) / len(live)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("config", [gspo(0.2, 0.2), gmpo(0.4), gmpo(0.02)])
def test_gradient_by_sequences_is_the_finite_difference_along_one(x64, config):
    """Moving all log-probs of a sequence together moves its ratio by as much as is not clipped."""
    log_prob, old, _ = case(5, spread=0.05)
    advantage = np.ones_like(log_prob)
    mode = "seq-mean-token-mean"
    gradient = jax.grad(lambda x: loss_of(x, old, advantage, config, mode)[0])(
        jnp.asarray(log_prob)
    )
    values = []
    for step in (1e-6, -1e-6):
        moved = log_prob.copy()
        moved[0, 5:8] += step
        tokens = reference.policy_loss(moved, old, advantage, MASK, SEGMENTS, config)
        values.append(reference.aggregate(tokens, MASK, SEGMENTS, mode))
    slope = (values[0] - values[1]) / 2e-6
    assert np.sum(gradient[0, 5:8]) == pytest.approx(slope, abs=1e-8)
    assert np.count_nonzero(gradient[0, 5:8]) == (1 if config == gmpo(0.02) else 2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.56, 0.0),  # above 1.28, rewarded: clipped, no gradient
        (1.5, -2.0, 3.0, 3.0),  # above, punished: not clipped
        (0.5, 2.0, -1.0, -1.0),  # below 0.8, rewarded: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below, punished: clipped
        (12.0, -2.0, 20.0, 0.0),  # dual clip at 10 |A|
    ],
)
def test_ppo_by_hand(x64, ratio, advantage, expected, slope):
    one = np.array([[0.0, np.log(ratio)]])
    arguments = [np.zeros((1, 2)), np.full((1, 2), advantage), PolicyConfig()]

    def loss(x):
        return loss_of(x, *arguments, mask=np.array([[False, True]]), segments=np.ones((1, 2)))[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(one))
    assert value == pytest.approx(expected, rel=1e-12)
    assert gradient[0, 1] == pytest.approx(slope, rel=1e-12) and gradient[0, 0] == 0


def test_all_kinds_have_the_policy_gradient_at_ratio_one(x64):
    log_prob, _, advantage = case(7)
    counted = MASK.sum()
    for name, config in POLICIES.items():
        gradient = jax.grad(lambda x, c=config: loss_of(x, log_prob, advantage, c)[0])(
            jnp.asarray(log_prob)
        )
        if name == "no lower bound":
            continue  # its upper bound is at the ratio 1 itself
        np.testing.assert_allclose(gradient, np.where(MASK, -advantage / counted, 0), rtol=1e-12)


@pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)
def test_garbage_outside_the_mask_has_no_influence(config):
    log_prob, old, advantage = case(dtype=np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(x, rest):
        return loss_of(x, *rest, config, "seq-mean-token-mean")[0]

    clean = loss(log_prob, (old, advantage))
    for garbage in (np.nan, np.inf, -np.inf):
        dirty = [np.where(MASK, x, garbage).astype(np.float32) for x in (log_prob, old, advantage)]
        jax.tree.map(np.testing.assert_array_equal, loss(dirty[0], tuple(dirty[1:])), clean)


def test_clip_flags_are_the_tokens_without_gradient():
    log_prob, old, advantage = case(dtype=np.float32)
    config = PolicyConfig(dual_clip=1.2)
    gradient = jax.grad(lambda x: loss_of(x, old, advantage, config)[0])(jnp.asarray(log_prob))
    terms = loss_of(log_prob, old, advantage, config)[1]
    stopped = np.asarray(terms.clipped_high | terms.clipped_low | terms.clipped_dual)
    assert stopped.any() and not stopped.all()
    np.testing.assert_array_equal(np.asarray(gradient)[MASK] == 0, stopped[MASK])


@pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)
def test_a_ratio_beyond_the_floating_point_format_has_no_nan(config):
    """Without a clamp, exp(90) and exp(-90): infinity times the zero slope of a clip was NaN."""
    config = dataclasses.replace(config, log_ratio_clamp=None)
    log_prob, _, advantage = case(dtype=np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(x, old):
        return loss_of(x, old, advantage, config)[0]

    for apart in (90.0, 500.0, -90.0, -500.0):
        value, gradient = loss(log_prob, log_prob - np.float32(apart))
        assert np.isfinite(value) and np.isfinite(gradient).all(), apart


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "trpo"}, "'ppo', 'gspo', 'gmpo', 'cispo', 'sapo', 'reinforce'.*got 'trpo'"),
        ({"negative_temperature": 0.0}, "negative_temperature must be > 0, got 0.0"),
        ({"clip_low": 1.5}, r"clip_low must be in \[0, 1\], got 1.5"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp must be > 0"),
    ],
)
def test_policy_config_refuses(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**changes)


# -- aggregation ------------------------------------------------------------------------------


aggregate_of = jax.jit(
    masked.aggregate, static_argnames=("mode", "sequences_per_row", "constant_length")
)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), mode=st.sampled_from(masked.AGGREGATIONS))
def test_totals_and_weights_add_up_over_micro_batches(seed, mode):
    """Hypothesis: any cut of the rows gives the same loss."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(6, 5)).astype(np.float32)
    mask = rng.random((6, 5)) < 0.5
    segments = np.sort(rng.integers(1, 3, (6, 5)), axis=1).astype(np.int32)
    cut = int(rng.integers(0, 7))

    def aggregate(rows):
        length = 5 if mode == "constant-length" else None
        arrays = values[rows], mask[rows], segments[rows]
        return aggregate_of(*arrays, mode=mode, sequences_per_row=2, constant_length=length)

    whole = aggregate(slice(None))
    parts = [aggregate(slice(0, cut)), aggregate(slice(cut, 6))]
    np.testing.assert_allclose(sum(p.total for p in parts), whole.total, atol=1e-5)
    np.testing.assert_allclose(sum(p.weight for p in parts), whole.weight, atol=1e-5)


@pytest.mark.parametrize("mode", masked.AGGREGATIONS)
def test_nothing_counted_is_zero_with_zero_gradient(mode):
    nothing = jnp.zeros((2, 4), bool)

    def loss(values):
        return masked.aggregate(
            values,
            nothing,
            jnp.ones((2, 4), jnp.int32),
            mode=mode,
            constant_length=4 if mode == "constant-length" else None,
        ).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.full((2, 4), jnp.nan))
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, "mode must be one of .* got 'mean'"),
        ({"mode": "constant-length"}, "needs constant_length > 0 tokens, got None"),
    ],
)
def test_aggregate_refuses(arguments, message):
    ones = jnp.ones((1, 2))
    with pytest.raises(ValueError, match=message):
        masked.aggregate(ones, ones > 0, jnp.ones((1, 2), jnp.int32), **arguments)


# -- advantages -------------------------------------------------------------------------------


def advantages_of(rewards, valid, method, **options):
    """With lengths and greedy rewards for the methods that read them."""
    rng = np.random.default_rng(3)
    lengths, greedy = rng.integers(1, 9, rewards.shape), rng.normal(size=len(rewards))
    options |= {"lengths": jnp.asarray(lengths), "greedy": jnp.asarray(greedy, rewards.dtype)}
    return group_advantages(jnp.asarray(rewards), valid, method=method, **options), lengths, greedy


group_advantages = jax.jit(advantages.group_advantages, static_argnames=("method", "ddof"))


@pytest.mark.parametrize("method", advantages.METHODS)
@pytest.mark.parametrize("ddof", [0, 1])
def test_advantages_are_the_loop(x64, method, ddof):
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, (5, 4)).astype(np.float64) + rng.normal(size=(5, 4)) * 0.1
    valid = np.ones((5, 4), bool)
    valid[1, 2] = valid[3, :3] = valid[4] = False  # one, all but one, all of a group
    got, lengths, greedy = advantages_of(rewards, jnp.asarray(valid), method, ddof=ddof)
    expected = reference.group_advantages(
        rewards, valid, method, ddof=ddof, lengths=lengths, greedy=greedy
    )
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("in_reward", [False, True])
@pytest.mark.parametrize("method", ADVANTAGES)
def test_advantages_of_tokens_are_the_loop(x64, method, in_reward):
    """Responses that begin anywhere; with the KL term in the rewards, or without."""
    rng = np.random.default_rng(4)
    rewards, lengths = rng.normal(size=(4, 3)), rng.integers(1, 6, (4, 3))
    valid = np.ones((4, 3), bool)
    valid[1, 2] = valid[3, :2] = False
    first = rng.integers(1, 4, (4, 3))
    columns = np.arange(8)[None, None]
    mask = (columns >= first[..., None]) & (columns < (first + lengths)[..., None])
    old, other = rng.normal(size=(2, 4, 3, 8))
    spoiled = [np.where(mask & valid[..., None], x, np.nan) for x in (old, other)]
    objective = ObjectiveConfig(
        advantage=method,
        gamma=0.9 if method == "reinforce++-tokens" else 1.0,
        kl_coefficient=0.3 if in_reward else 0.0,
        kl_in_reward=in_reward,
        kl_estimator="k1",
    )
    greedy = rng.normal(size=4)
    got = jax.jit(functools.partial(token_advantages, objective))(
        rewards,
        valid,
        mask.reshape(12, 8),
        old_log_prob=spoiled[0].reshape(12, 8),
        reference_log_prob=spoiled[1].reshape(12, 8),
        greedy=greedy,
    ).reshape(4, 3, 8)
    penalties = np.zeros((4, 3, 8))  # of a response's tokens, from its first one on
    for p, g, t in np.argwhere(mask):
        penalties[p, g, t - first[p, g]] = 0.3 * in_reward * (old - other)[p, g, t]
    if method in advantages.METHODS:
        options = {"lengths": lengths, "greedy": greedy, "penalties": penalties}
        expected = reference.group_advantages(rewards, valid, method, **options)[..., None]
    else:
        expected = reference.token_advantages(
            rewards, valid, lengths, penalties, method, objective.gamma
        )
    for p, g in np.ndindex(4, 3):
        own = np.broadcast_to(expected[p, g], 8)[: lengths[p, g]]
        np.testing.assert_allclose(got[p, g][mask[p, g]], own, rtol=1e-10, atol=1e-14)
    assert not np.any(np.where(mask, 0, got))


def test_grpo_by_hand(x64):
    """Rewards 1, 0, 0, 0: mean 1/4, unbiased standard deviation 1/2."""
    rewards = jnp.array([[1.0, 0.0, 0.0, 0.0]])
    got = advantages.group_advantages(rewards, rewards >= 0, epsilon=0.0)
    np.testing.assert_allclose(got, [[1.5, -0.5, -0.5, -0.5]], rtol=1e-12)


@pytest.mark.parametrize("method", advantages.METHODS)
def test_what_an_invalid_sample_got_has_no_influence(method):
    rewards = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    valid = jnp.array([[True, True, False], [True, True, True]])
    one = advantages_of(rewards, valid, method)[0]
    other = advantages_of(rewards.at[0, 2].set(jnp.nan), valid, method)[0]
    np.testing.assert_array_equal(one, other)
    assert one[0, 2] == 0


@pytest.mark.parametrize("method", [m for m in advantages.METHODS if m != "remax"])
def test_rewards_that_are_equal_give_exactly_nothing(method):
    """Whatever the rounding of their mean: 0.7 and 1 - 1/3 in float32, over odd numbers of them."""
    for reward in (1.0, 0.7, 1 - 1 / 3, -0.1):
        for samples in (3, 5, 7, 8):
            rewards = jnp.full((3, samples), reward, jnp.float32)
            got = advantages_of(rewards, rewards < 2, method)[0]
            np.testing.assert_array_equal(got, np.zeros((3, samples)))
    equal = advantages.whiten(rewards, rewards < 2)
    np.testing.assert_array_equal(equal, np.zeros((3, 8)))


@pytest.mark.parametrize(
    ("shape", "method", "message"),
    [
        ((2, 4), "gae", "must be one of .* got 'gae'"),
        ((0, 4), "grpo", "at least one of each, got shape \\(0, 4\\)"),
        ((2, 0), "grpo", "at least one of each"),
        ((2, 1), "grpo", "a group of one has nothing to compare"),
        ((2, 4), "opo", "method 'opo' needs lengths="),
        ((2, 4), "remax", "method 'remax' needs greedy="),
    ],
)
def test_advantages_refuse(shape, method, message):
    with pytest.raises(ValueError, match=message):
        advantages.group_advantages(jnp.zeros(shape), jnp.ones(shape, bool), method=method)


def test_overlong_penalty_refuses_a_buffer_beyond_the_length():
    with pytest.raises(ValueError, match="between 1 and max_length=4"):
        advantages.overlong_penalty(jnp.array([1]), max_length=4, buffer=5)


# -- divergences ------------------------------------------------------------------------------


def test_kl_estimators_by_their_expectations(x64):
    """Over a whole distribution: E[k1] = E[k3] = KL; the gradient of E[k2 as loss] is KL's."""
    logits = jnp.array([0.3, -1.0, 0.7])
    reference_log_prob = jax.nn.log_softmax(jnp.array([0.0, 0.2, -0.4]))
    log_prob = jax.nn.log_softmax(logits)
    probability = jnp.exp(log_prob)
    exact = jnp.sum(probability * (log_prob - reference_log_prob))

    def expectation(estimator, x):
        value = divergences.kl(x[None], reference_log_prob[None], estimator=estimator)
        return jnp.sum(probability[None] * value)

    for estimator in ("k1", "k3"):
        np.testing.assert_allclose(expectation(estimator, log_prob), exact, rtol=1e-12)

    def true_kl(x):
        return jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference_log_prob))

    k2 = jax.grad(lambda x: expectation("k2", jax.nn.log_softmax(x)))(logits)
    k1 = jax.grad(lambda x: expectation("k1", jax.nn.log_softmax(x)))(logits)
    np.testing.assert_allclose(k2, jax.grad(true_kl)(logits), rtol=1e-10)
    np.testing.assert_allclose(k1, np.zeros(3), atol=1e-15)
    np.testing.assert_allclose(
        divergences.kl(jnp.array([[1.0]]), jnp.array([[3.0]]), estimator="abs"), [[2.0]]
    )


def test_kl_clamps_and_refuses():
    far = divergences.kl(jnp.array([[50.0]]), jnp.array([[0.0]]), estimator="k1", clamp=20.0)
    assert far[0, 0] == 20
    with pytest.raises(ValueError, match="estimator must be one of"):
        divergences.kl(far, far, estimator="k4")


@pytest.mark.parametrize("loss", ["entropy", "distillation", "top k", "variation"])
def test_a_logit_of_minus_infinity_is_probability_zero(loss):
    """In values and gradients: as a logit of -50, but for what float32 does not see."""
    inf = jnp.inf
    logits = jnp.array([[[0.0, -inf, -inf], [0.3, -inf, 1.0], [0.1, 0.0, 0.2]]])
    targets = jnp.array([[[0.0, -inf, -inf], [1.0, -inf, 0.5], [0.0, 0.0, -inf]]])

    @jax.jit
    def value_and_gradient(logits, targets):
        def tokens(x):
            if loss == "entropy":
                return divergences.token_entropy(x)
            if loss == "top k":
                return mtp.top_k_distillation(x, targets, 2)
            between = mtp.distillation if loss == "distillation" else mtp.total_variation
            return between(x, targets)

        return tokens(logits), jax.grad(lambda x: jnp.sum(tokens(x)))(logits)

    got = value_and_gradient(logits, targets)
    near = value_and_gradient(jnp.maximum(logits, -50), jnp.maximum(targets, -50))
    for one, other in zip(got, near, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_top_k_distillation_and_total_variation_by_loops(x64, k):
    """Values and gradients; with k of all five tokens it is the whole divergence."""
    rng = np.random.default_rng(k)
    logits, targets = (jnp.asarray(rng.normal(size=(2, 3, 5)) * 2) for _ in range(2))
    p, q = (np.asarray(jax.nn.softmax(x)) for x in (targets, logits))
    top = jax.jit(functools.partial(mtp.top_k_distillation, k=k))
    total_variation = jax.jit(mtp.total_variation)
    top_values, variations = top(logits, targets), total_variation(logits, targets)
    for row, time in np.ndindex(2, 3):
        a, b = p[row, time], q[row, time]
        best = sorted(range(5), key=lambda v: -a[v])[:k]
        rest, its = 1 - a[best].sum(), 1 - b[best].sum()
        expected = sum(a[v] * np.log(a[v] / b[v]) for v in best)
        expected += rest * np.log(rest / its) if k < 5 else 0
        np.testing.assert_allclose(top_values[row, time], expected, atol=1e-12)
        variation = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2
        np.testing.assert_allclose(variations[row, time], variation, atol=1e-12)
    for loss in (top, total_variation):
        total = jax.jit(functools.partial(lambda x, y, loss: jnp.sum(loss(x, y)), loss=loss))
        slope, towards = jax.jit(jax.grad(total, (0, 1)))(logits, targets)
        assert not towards.any()
        direction, step = jnp.asarray(rng.normal(size=logits.shape)), 1e-6
        ends = [total(logits + sign * step * direction, targets) for sign in (1, -1)]
        assert abs(jnp.sum(slope * direction) - (ends[0] - ends[1]) / (2 * step)) < 1e-8
    if k >= 5:
        np.testing.assert_allclose(top_values, mtp.distillation(logits, targets))


def test_what_the_head_alone_excludes_is_infinitely_far():
    assert np.isposinf(mtp.distillation(jnp.array([[[0.0, -jnp.inf]]]), jnp.zeros((1, 1, 2)))[0, 0])


def test_importance_weight_is_truncated_and_has_no_gradient():
    old, rollout = jnp.array([[0.0, -1.0]]), jnp.array([[-3.0, 0.0]])
    weight = divergences.truncated_importance_weight(old, rollout, cap=2.0)
    np.testing.assert_allclose(weight, [[2.0, np.exp(-1)]], rtol=1e-6)
    gradient = jax.grad(
        lambda x: jnp.sum(divergences.truncated_importance_weight(x, rollout, cap=2.0))
    )(old)
    assert not np.any(gradient)
    with pytest.raises(ValueError, match="cap must be > 0"):
        divergences.truncated_importance_weight(old, rollout, cap=0.0)


# -- alignment --------------------------------------------------------------------------------


def token_log_prob(logits, tokens, depth):
    log_prob = mtp.log_prob_at_source(logits, mtp.labels_at_source(tokens, depth))
    return mtp.align(log_prob, depth)


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 8, 20])
def test_log_probs_in_token_alignment_are_the_loop(x64, depth):
    rng = np.random.default_rng(depth)
    tokens = rng.integers(0, 5, SEGMENTS.shape)
    logits = rng.normal(size=(*SEGMENTS.shape, 5))
    got = token_log_prob(jnp.asarray(logits), jnp.asarray(tokens), depth)
    can = mtp.predictable(jnp.asarray(SEGMENTS), depth)
    expected, expected_can = reference.token_log_prob(logits, tokens, SEGMENTS, depth)
    np.testing.assert_array_equal(can, expected_can)
    np.testing.assert_allclose(np.where(can, got, 0), expected, rtol=1e-12)
    mask = mtp.aligned_mask(jnp.asarray(MASK), jnp.asarray(SEGMENTS), depth)
    np.testing.assert_array_equal(mask, MASK & expected_can)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 50)) * 5, jnp.bfloat16)
    tokens = jnp.zeros((1, 4), jnp.int32)
    got = token_log_prob(logits, tokens, 0)
    wide = token_log_prob(logits.astype(jnp.float32), tokens, 0)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, wide)


def test_negative_depth_is_refused():
    with pytest.raises(ValueError, match="0 is the main head"):
        mtp.predictable(jnp.ones((1, 3), jnp.int32), -1)
