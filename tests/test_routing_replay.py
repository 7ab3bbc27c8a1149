"""Experts that were chosen in sampling, and are taken again in scoring and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import tasks
from occ.generation.decoding import generate
from occ.generation.sampling import SamplingConfig
from occ.models.config import MoEConfig
from occ.models.decoder import merge_model
from occ.models.policy import Policy
from occ.training.batch import check, split
from occ.training.config import EvaluationConfig, LayoutConfig, OptimizerConfig, RolloutConfig
from occ.training.packing import pack, rows_needed
from occ.training.regimes import regime
from occ.training.rollout import build_programs, collect
from occ.training.score import score_sequences
from tests import reference_models as reference
from tests import tiny
from tests.reference_models import MOE, random_model, rows, small_config

KEY = jax.random.key(3)
PROMPT, NEW = 5, 6
CONFIG = small_config(1, num_layers=3, moe=dataclasses.replace(MOE, first_dense_layers=1))
SAMPLING = SamplingConfig(max_new_tokens=NEW, stop_tokens=(1, 2), keep_experts=True)
SMALL_MOE = MoEConfig(num_experts=4, experts_per_token=2, expert_width=8)
TASK = dataclasses.replace(
    tasks.load("arithmetic", digits=1, train_size=40, test_size=10),
    verifier=lambda problem, completion: float(len(completion) % 2),
)

sample = jax.jit(generate, static_argnames=("config", "slots", "draft_depth"))
score = jax.jit(score_sequences)


def policy_of(config, seed=0):
    return Policy(config, *random_model(config, seed)[1:])


def other_choice(experts, count):
    """The same numbers of experts a token, of which the first is another one."""
    others = (np.asarray(experts) + 1) % count
    return np.where(np.asarray(experts) >= 0, others, -1)


@functools.partial(jax.jit, static_argnums=0)
def trunk(graphdef, params, rest, inputs, experts):
    return merge_model(graphdef, params, rest).trunk(*inputs, experts)


@functools.partial(jax.jit, static_argnums=0)
def own_choice(graphdef, params, rest, tokens, lengths):
    """Experts [B, T, L, k] of one pass over whole sequences."""
    model = merge_model(graphdef, params, rest)
    return model.prefill(tokens, lengths, keep_experts=True)[1].experts


# -- the model ----------------------------------------------------------------------------------


def random_experts(config, shape, seed=5):
    """k different ones of each token in each sparse layer: [L, k, B, T]."""
    moe = config.moe
    rng = np.random.default_rng(seed)
    sparse = config.num_layers - moe.first_dense_layers
    draws = rng.permuted(np.tile(np.arange(moe.num_experts), (sparse, *shape, 1)), axis=-1)
    return np.moveaxis(draws[..., : moe.experts_per_token], -1, 1).astype(np.int8)


@pytest.mark.parametrize(
    "moe",
    [MOE, dataclasses.replace(MOE, first_dense_layers=0, normalise_top_k=False)],
    ids=["a dense layer", "raw gates"],
)
def test_replayed_experts_are_those_that_compute(x64, moe):
    config = dataclasses.replace(CONFIG, moe=moe)
    model = random_model(config)
    inputs = reference.packed([5, 2], 9, config)
    experts = random_experts(config, inputs[0].shape)
    expected = reference.forward(*model[1:], config, *inputs, experts)
    got = trunk(*model, inputs, experts)
    np.testing.assert_allclose(got.hidden, expected.hidden, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(got.router_load, expected.load)
    free = trunk(*model, inputs, None)
    assert np.abs(free.hidden - got.hidden).max() > 1e-2


def test_minus_one_is_the_routers_own_choice(x64):
    model = random_model(CONFIG)
    inputs = rows(CONFIG, [9, 6], 9)
    nothing = np.full((2, 2, 2, 9), -1, np.int8)
    free, same = trunk(*model, inputs, None), trunk(*model, inputs, nothing)
    np.testing.assert_array_equal(free.hidden, same.hidden)
    some = random_experts(CONFIG, inputs[0].shape)
    some[..., 4:] = -1  # of later tokens, which those before do not see
    half = trunk(*model, inputs, some)
    expected = trunk(*model, inputs, random_experts(CONFIG, inputs[0].shape))
    np.testing.assert_allclose(half.hidden[:, :4], expected.hidden[:, :4], atol=1e-12)
    assert np.abs(half.hidden - expected.hidden).max() > 1e-2


def test_the_gradient_is_that_of_the_weights_of_the_experts(x64):
    """Against finite differences: the router learns although its choice is not its own."""
    graphdef, params, rest = random_model(CONFIG)
    inputs = rows(CONFIG, [9, 6], 9)
    experts = random_experts(CONFIG, inputs[0].shape)

    def loss(router):
        changed = {**params, "layers": {**params["layers"]}}
        changed["layers"]["mlp"] = {**params["layers"]["mlp"], "router": router}
        return jnp.sum(jnp.sin(trunk(graphdef, changed, rest, inputs, experts).hidden))

    router = params["layers"]["mlp"]["router"]
    gradient = jax.grad(loss)(router)
    direction = jax.random.normal(KEY, router.shape, router.dtype)
    step = 1e-5
    numeric = (loss(router + step * direction) - loss(router - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=1e-7)
    assert abs(numeric) > 1e-3


# -- generation ---------------------------------------------------------------------------------


def sampled_from(policy, **changes):
    tokens, _, segment_ids = rows(policy.config, (2, 5, 3), PROMPT, "left")
    prompt_of = np.repeat(np.arange(3, dtype=np.int32), 3)
    options = {"slots": 0, "draft_depth": 0} | changes
    mask = segment_ids == 1
    made = sample(policy, tokens, mask, KEY, config=SAMPLING, prompt_of=prompt_of, **options)
    return made, mask[prompt_of]


@pytest.mark.parametrize("changes", [{}, {"slots": 4, "draft_depth": 2}], ids=str)
def test_generation_says_which_experts_a_token_went_to(x64, changes):
    """Those of a pass over the whole sequence, in which rounding is no matter in float64."""
    policy = policy_of(CONFIG)
    made, prompt_mask = sampled_from(policy, **changes)
    present = np.array(made.response_mask)
    present[:, :PROMPT] |= prompt_mask
    lengths = present.sum(axis=1).astype(np.int32)
    tokens, experts = np.asarray(made.tokens), np.asarray(made.experts)
    left = np.zeros_like(tokens)
    for row, length in enumerate(lengths):
        left[row, :length] = tokens[row][present[row]]
    expected = np.asarray(own_choice(*random_model(CONFIG), left, lengths))
    assert experts.shape == (2, 2, *tokens.shape) and experts.dtype == np.int8
    for row, length in enumerate(lengths):
        columns = np.flatnonzero(present[row])
        got = np.moveaxis(experts[:, :, row, columns[:-1]], -1, 0)
        np.testing.assert_array_equal(got, expected[row, : length - 1])
    seen = present.copy()
    seen[np.arange(len(seen)), [np.flatnonzero(row)[-1] for row in present]] = False
    np.testing.assert_array_equal((experts >= 0).all(axis=(0, 1)), seen)
    assert (experts[:, :, ~seen] == -1).all()
    assert len(np.unique(lengths)) > 2  # or this has not seen slots refilled


def test_a_dense_model_has_none_to_keep():
    config = small_config(dtype="float32")
    with pytest.raises(ValueError, match="keep_experts is of a mixture of experts"):
        sampled_from(policy_of(config))
    with pytest.raises(ValueError, match=r"routing_replay .* the model is dense"):
        tiny.run_config("dense", rollout=RolloutConfig(routing_replay=True))


# -- training -----------------------------------------------------------------------------------


def config_for(dtype="float32", **changes):
    model = tiny.model_config(1, dtype, vocab_size=14, moe=SMALL_MOE)
    return tiny.run_config(
        "replay",
        model=model,
        rollout=RolloutConfig(prompts=4, samples=4, minibatches=2, routing_replay=True),
        evaluation=EvaluationConfig(every=9, prompts=4, samples=1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        **changes,
    )


def rollout_of(config, seed=0):
    programs = build_programs(config, TASK)
    policy = tiny.policy(config, tiny.build_model(config.model, seed))
    return programs, policy, collect(programs, policy, config, TASK, 0)


@pytest.mark.standard_promotion
def test_a_rollout_is_scored_with_the_experts_of_sampling(x64):
    config = config_for("float64")
    programs, policy, rollout = rollout_of(config)
    batch = rollout.batch
    mask = batch.response_mask
    check(batch, 1)
    np.testing.assert_allclose(batch.old_log_prob[mask], batch.rollout_log_prob[mask], atol=1e-6)
    others = other_choice(batch.experts, SMALL_MOE.num_experts)
    scores = programs.score(policy, batch.tokens, batch.segment_ids, others)
    assert np.abs(scores.log_prob[mask] - batch.rollout_log_prob[mask]).max() > 1e-2


def spoiled(batch, seed=1):
    """With other experts for some tokens, so that a replay that is forgotten shows."""
    rng = np.random.default_rng(seed)
    others = other_choice(batch.experts, SMALL_MOE.num_experts)
    here = rng.random(batch.tokens.shape) < 0.5
    return batch.replace(experts=np.where(here, others, batch.experts).astype(np.int8))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_portions_replay_the_same_experts(x64):
    base = config_for("float64")
    config = dataclasses.replace(base, mtp=regime("occ"))
    batch = spoiled(split(rollout_of(config)[2].batch, 2)[0])
    whole = dataclasses.replace(config, layout=LayoutConfig())
    cut = dataclasses.replace(config, layout=LayoutConfig(micro_batches=2, logits_chunk=3))
    others = other_choice(batch.experts, SMALL_MOE.num_experts).astype(batch.experts.dtype)
    other = batch.replace(experts=others)
    expected, got, apart = (
        tiny.gradient(one, tiny.build_model(config.model), minibatch).gradient
        for one, minibatch in ((whole, batch), (cut, batch), (whole, other))
    )
    largest = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, got)))
    apart = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, apart)))
    assert largest < 1e-6 < 1e-4 < apart  # the batch itself is in float32


@pytest.mark.standard_promotion
def test_packing_takes_experts_along(x64):
    config = config_for("float64")
    _, policy, rollout = rollout_of(config)
    batch = spoiled(rollout.batch)
    time = batch.tokens.shape[1]
    options = {"length": 2 * time, "sequences_per_row": 4, "keep_uncounted": True}
    packed = pack(batch, rows=rows_needed(batch, **options), **options)
    assert packed.experts.shape[:2] == batch.experts.shape[:2]
    plain = score(policy, batch.tokens, batch.segment_ids, batch.experts)
    joined = score(policy, packed.tokens, packed.segment_ids, packed.experts)
    mask, packed_mask = np.asarray(batch.response_mask), np.asarray(packed.response_mask)
    one = np.sort(np.asarray(plain.log_prob)[mask])
    np.testing.assert_allclose(np.sort(np.asarray(joined.log_prob)[packed_mask]), one, atol=1e-12)
    free = np.sort(np.asarray(score(policy, batch.tokens, batch.segment_ids).log_prob)[mask])
    assert np.abs(free - one).max() > 1e-4
