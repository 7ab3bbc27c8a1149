"""From prompts to a minibatch: what is in it, what is left out, and what decides it."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from occ import tasks
from occ.generation.sampling import Work
from occ.objectives.advantages import group_advantages
from occ.tasks import VerifierError
from occ.training import loop
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    ObjectiveConfig,
    RolloutConfig,
    TrainConfig,
)
from occ.training.evaluate import evaluate
from occ.training.regimes import regime
from occ.training.rollout import build_programs, collect
from tests import tiny

TASK = tasks.load("arithmetic", digits=1, train_size=40, test_size=10)
COLUMNS = TASK.max_prompt_tokens


def config_for(mtp="occ_paper", **changes):
    rollout = RolloutConfig(prompts=4, samples=4, minibatches=2, **changes.pop("rollout", {}))
    return TrainConfig(
        name="tiny",
        model=tiny.model_config(1, vocab_size=TASK.tokenizer.vocab_size),
        task="arithmetic",
        mtp=regime(mtp),
        rollout=rollout,
        evaluation=EvaluationConfig(prompts=6, samples=2),
        **changes,
    )


def policy_of(model):
    return tiny.policy(config_for(), model)


@pytest.fixture(scope="module")
def model():
    return tiny.build_model(config_for().model)


@pytest.fixture(scope="module")
def programs(model):
    return build_programs(config_for(), TASK)


def judged_by(verifier):
    return dataclasses.replace(TASK, verifier=verifier)


def by_length(problem, completion):
    """Rewards that vary, whatever an untrained model says."""
    return float(len(completion) % 2)


def test_a_rollout_depends_on_seed_and_step_and_not_on_the_regime(model, programs):
    task = judged_by(by_length)
    runs = {
        "detach": collect(programs, policy_of(model), config_for("detach"), task, 3),
        "occ": collect(programs, policy_of(model), config_for("occ"), task, 3),
        "step": collect(programs, policy_of(model), config_for("detach"), task, 4),
        "seed": collect(programs, policy_of(model), config_for("detach", seed=1), task, 3),
    }
    chex.assert_trees_all_equal(runs["detach"].batch, runs["occ"].batch)
    for other in ("step", "seed"):
        assert not np.array_equal(runs[other].batch.tokens, runs["detach"].batch.tokens)


def test_what_a_minibatch_holds(model, programs):
    task = judged_by(by_length)
    rollout = collect(programs, policy_of(model), config_for(), task, 0)
    batch = rollout.batch
    segment_ids, mask = np.asarray(batch.segment_ids), np.asarray(batch.response_mask)
    scores = tiny.score(policy_of(model), batch.tokens, batch.positions, batch.segment_ids)
    for old, score in zip((batch.old_log_prob, batch.old_mtp_log_prob[0]), scores, strict=True):
        np.testing.assert_allclose(old[:, COLUMNS:], score.log_prob[:, COLUMNS:], atol=1e-5)
        assert not old[:, :COLUMNS].any()  # prompts are not scored
    # Sampled token by token with a cache, and scored in one pass: the same distribution.
    np.testing.assert_allclose(
        np.asarray(batch.rollout_log_prob)[mask], np.asarray(batch.old_log_prob)[mask], atol=1e-4
    )
    rewards = []
    for row in range(16):
        text = TASK.tokenizer.decode(np.asarray(batch.tokens)[row, COLUMNS:][mask[row, COLUMNS:]])
        rewards.append(by_length(None, text))
    assert rollout.metrics["reward"] == pytest.approx(np.mean(rewards))
    expected = group_advantages(jnp.float32(rewards).reshape(4, 4), jnp.ones((4, 4), bool)).reshape(
        16, 1
    )
    np.testing.assert_allclose(batch.advantages, np.where(mask, expected, 0), atol=1e-5)
    assert not mask[:, :COLUMNS].any() and not mask[segment_ids == 0].any()


@pytest.mark.slow
def test_slots_and_drafts_make_the_same_rollout(model):
    """Prompts of two lengths in many more columns than they need, each run once for its samples."""
    task = dataclasses.replace(
        tasks.load("arithmetic", digits=2, train_size=40, test_size=10), verifier=by_length
    )
    config = config_for(max_prompt_tokens=16)
    whole = collect(build_programs(config, task), policy_of(model), config, task, 0)
    layout = LayoutConfig(generation_rows=4, draft_depth=1)
    config = dataclasses.replace(config, layout=layout)
    programs = build_programs(config, task)
    parts = collect(programs, policy_of(model), config, task, 0)
    for name in ("tokens", "segment_ids", "response_mask", "advantages"):
        np.testing.assert_array_equal(getattr(parts.batch, name), getattr(whole.batch, name))
    np.testing.assert_allclose(
        parts.batch.rollout_log_prob, whole.batch.rollout_log_prob, atol=1e-5
    )
    waste, (acceptance,) = "rollout/padding_waste", parts.metrics["rollout/acceptance"]
    assert 0 < acceptance < 1 < parts.metrics["rollout/tokens_a_pass"] <= 1 + acceptance
    assert not parts.metrics["alarm/drafts_refused"] and "rollout/acceptance" not in whole.metrics
    assert 0 < parts.metrics[waste] < whole.metrics[waste] < 1
    present, steps = np.asarray(whole.batch.segment_ids) > 0, task.max_response_tokens
    assert np.asarray(whole.batch.response_mask)[:, -1].any()  # some response went on to the end
    present[:, :16] &= (np.arange(16) % 4 == 0)[:, None]  # each prompt once
    assert whole.metrics[waste] == pytest.approx(1 - present.sum() / (4 * 16 + 16 * steps))


def test_drafts_that_are_all_refused_sound_an_alarm(programs, model):
    work = Work(*map(np.asarray, (4, 9, [7, 0], [0, 0], 20)))

    def program(*inputs, **options):
        return programs.sample.program(*inputs, **options)._replace(work=work)

    stale = dataclasses.replace(
        programs, sample=dataclasses.replace(programs.sample, program=program)
    )
    with pytest.warns(RuntimeWarning, match=r"All 7 drafts .* \(rollout 3\)"):
        rollout = collect(stale, policy_of(model), config_for(), TASK, 3)
    assert rollout.metrics["alarm/drafts_refused"] == 1
    assert rollout.metrics["rollout/acceptance"] == [0, 0]


def test_groups_without_variance_are_counted_and_dropped_if_asked(model, programs):
    seen = []

    def verifier(problem, completion):
        """The first prompt's samples vary, those of all others do not."""
        seen.append(problem.prompt)
        return float(len(seen) % 2) if problem.prompt == seen[0] else 1.0

    plain = collect(programs, policy_of(model), config_for(), judged_by(verifier), 0)
    seen.clear()
    dropping = config_for(rollout={"dynamic_sampling": True})
    dropped = collect(programs, policy_of(model), dropping, judged_by(verifier), 0)
    for rollout in (plain, dropped):
        assert rollout.metrics["rollout/zero_variance_groups"] == pytest.approx(0.75)
    assert np.asarray(plain.batch.response_mask).any(axis=1).all()
    counted = np.asarray(dropped.batch.response_mask).any(axis=1)
    assert counted.tolist() == [True] * 4 + [False] * 12


def test_a_sample_that_could_not_be_judged_is_in_no_loss(model, programs):
    calls = []

    def verifier(problem, completion):
        calls.append(completion)
        if len(calls) == 6:
            raise VerifierError
        return by_length(problem, completion)

    rollout = collect(programs, policy_of(model), config_for(), judged_by(verifier), 0)
    counted = np.asarray(rollout.batch.response_mask).any(axis=1)
    assert counted.tolist() == [row != 5 for row in range(16)]
    assert rollout.metrics["rollout/invalid"] == pytest.approx(1 / 16)
    assert not np.any(np.asarray(rollout.batch.advantages)[5])


def test_responses_that_were_cut_off(model):
    """Of twelve tokens an untrained model ends about half: filtered out, or punished."""
    task = judged_by(lambda problem, completion: 1.0)
    config = config_for(max_response_tokens=12)
    programs = build_programs(config, task)
    plain = collect(programs, policy_of(model), config, task, 0)
    filtering = config_for(rollout={"overlong_filter": True}, max_response_tokens=12)
    filtered = collect(programs, policy_of(model), filtering, task, 0)
    punishing = config_for(rollout={"overlong_buffer": 1}, max_response_tokens=12)
    punished = collect(programs, policy_of(model), punishing, task, 0)
    finished = np.any(np.asarray(plain.batch.tokens)[:, COLUMNS:] == TASK.tokenizer.end_id, axis=1)
    assert 0 < finished.sum() < 16
    counted = np.asarray(filtered.batch.response_mask).any(axis=1)
    np.testing.assert_array_equal(counted, finished)
    assert not np.any(plain.batch.advantages)
    lengths = np.asarray(plain.batch.response_mask).sum(axis=1)
    lowest = np.asarray(punished.batch.advantages).min(axis=1)
    assert np.all(lengths[lowest < 0] == 12) and np.any(lowest < 0)
    assert punished.metrics["reward"] == 1.0  # what is reported stays the verifier's
    # All answers are right: the penalty makes no group one to learn correctness from.
    both = config_for(
        rollout={"overlong_buffer": 1, "dynamic_sampling": True}, max_response_tokens=12
    )
    dropped = collect(programs, policy_of(model), both, task, 0)
    assert not np.any(dropped.batch.response_mask)
    assert dropped.metrics["rollout/zero_variance_groups"] == 1.0


def test_the_baseline_may_be_the_most_likely_response_and_the_rewards_hold_a_kl_term(
    model, programs
):
    """ReMax, judged beside the samples; k1 to another policy, summed over a response."""
    objective = ObjectiveConfig(
        advantage="remax", kl_coefficient=0.5, kl_in_reward=True, kl_estimator="k1"
    )
    calls = []

    def verifier(problem, completion):
        calls.append((problem.prompt, by_length(problem, completion)))
        return calls[-1][1]

    other = policy_of(tiny.build_model(config_for().model, seed=5))
    config = config_for(objective=objective)
    batch = collect(programs, policy_of(model), config, judged_by(verifier), 0, other).batch
    sampled, likely = np.array([r for _, r in calls[:16]]), np.array([r for _, r in calls[16:]])
    assert [prompt for prompt, _ in calls[:16:4]] == [prompt for prompt, _ in calls[16:]]
    mask = np.asarray(batch.response_mask)
    kl = np.where(mask, batch.old_log_prob - batch.reference_log_prob, 0).sum(axis=1)
    expected = sampled - 0.5 * kl - np.repeat(likely, 4)
    np.testing.assert_allclose(
        batch.advantages, np.where(mask, expected[:, None], 0), rtol=1e-4, atol=1e-5
    )
    assert np.abs(kl).min() > 1e-3


def test_evaluation_counts_what_the_verifier_accepts(model, programs):
    config = config_for()
    got = evaluate(programs, policy_of(model), config, judged_by(by_length))
    assert 0 < got["sampled"] < 1 and got["greedy"] * 6 == pytest.approx(round(got["greedy"] * 6))
    assert len(got["mtp_acceptance"]) == 1 and 0 <= got["mtp_acceptance"][0] <= 1
    everything = evaluate(programs, policy_of(model), config, judged_by(lambda *_: 1.0))
    assert everything["greedy"] == everything["sampled"] == 1
    again = evaluate(programs, policy_of(model), config, judged_by(by_length))
    assert again == got


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_prompt_tokens": 40}, "max_length"),
        ({"model": tiny.model_config(1, vocab_size=5)}, "has 14 tokens, the model only 5"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.build(dataclasses.replace(config_for(), **changes), TASK)


def test_each_sampler_has_its_own_temperature(model):
    evaluation = EvaluationConfig(prompts=6, samples=2, temperature=0.6, top_p=0.9)
    config = dataclasses.replace(config_for(rollout={"temperature": 0.8}), evaluation=evaluation)
    built = build_programs(config, TASK)
    found = {name: getattr(built, name).sampling for name in ("sample", "greedy", "evaluation")}
    assert {name: one.temperature for name, one in found.items()} == {
        "sample": 0.8,
        "greedy": 0.0,
        "evaluation": 0.6,
    }
    assert found["evaluation"].top_p == 0.9 and found["sample"].top_p == 1


def test_a_prompt_longer_than_its_columns_is_refused(model, programs):
    config = dataclasses.replace(config_for(), max_prompt_tokens=3)
    with pytest.raises(ValueError, match="has 4 tokens, expected 1 to 3.*raise max_prompt_tokens"):
        collect(programs, policy_of(model), config, TASK, 0)


def test_more_test_prompts_than_there_are_is_refused(model, programs):
    config = dataclasses.replace(config_for(), evaluation=EvaluationConfig(prompts=11))
    with pytest.raises(ValueError, match="11 test prompts are asked for.*has 10"):
        evaluate(programs, policy_of(model), config, TASK)
