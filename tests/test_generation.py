"""Cached decoding against full forward passes, and sampling against its distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ.evaluation.portions import portions
from occ.generation.decoding import generate
from occ.generation.drafting import check_depth, judge
from occ.generation.sampler import COLUMN_RUNGS, Sampler, padding_waste
from occ.generation.sampling import (
    SamplingConfig,
    check_fits,
    choose,
    choose_by_rejection,
    gumbel_noise,
    log_prob_of,
    restrict,
)
from occ.models.attention import Context
from occ.models.cache import Cache
from occ.models.config import MTPConfig
from occ.models.decoder import merge_model
from occ.models.mtp import tokens_ahead
from occ.models.policy import Policy
from tests.reference_models import MOE, random_model, rows, small_config

SIZES = pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
LENGTHS = (2, 5, 3)
PROMPT, NEW = 5, 6
KEY = jax.random.key(7)

sample = jax.jit(generate, static_argnames="config")


@functools.partial(jax.jit, static_argnums=0)
def full_logits(graphdef, params, rest, tokens, positions, segment_ids):
    model = merge_model(graphdef, params, rest)
    return model.logits(model.trunk(tokens, positions, segment_ids).hidden)


def prompts(config, lengths=LENGTHS, columns=PROMPT, seed=0):
    tokens, _, segment_ids = rows(config, lengths, columns, "left", seed)
    return jnp.asarray(tokens), jnp.asarray(segment_ids == 1)


def whole(generation, prompt_mask):
    """Tokens, positions and segment ids of prompts with their responses."""
    segment_ids = np.asarray(generation.response_mask).astype(np.int32)
    segment_ids[:, : prompt_mask.shape[1]] = np.asarray(prompt_mask)
    positions = np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0) * segment_ids
    return np.asarray(generation.tokens), positions.astype(np.int32), segment_ids


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def restricted_by_loop(logits, config):
    """Log-probs of one row: sort, cut, renormalise."""
    logits = np.asarray(logits, np.float64) / config.temperature
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if config.top_k:
        order = order[: config.top_k]
    probability = np.exp(log_softmax(logits[order]))
    kept, total = [], 0.0
    for token, p in zip(order, probability, strict=True):
        if total < config.top_p:
            kept.append(token)
        total += p
    result = np.full(len(logits), -np.inf)
    result[kept] = log_softmax(logits[kept])
    return result


# -- the cache --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def extended(graphdef, params, rest, tokens, lengths):
    """The states of each row's last four tokens: after a prefill of the others, and a token that is
    taken back, one and then three at a time."""
    model = merge_model(graphdef, params, rest)
    known, running = lengths - 4, jnp.ones(lengths.shape, bool)
    _, begun = model.prefill(tokens, known)
    room = model.empty_cache(*tokens.shape, spare=3)
    stacks = [old.write(new, 0 * known) for old, new in zip(room.stacks, begun.stacks, strict=True)]
    cache, states = Cache(tuple(stacks), known), []
    _, cache = model.extend(tokens[:, :1], cache, running)
    for first, count in ((0, 1), (1, 3)):
        columns = (known + first)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        further = jnp.take_along_axis(tokens, columns, axis=1)
        hidden, cache = model.extend(further, cache, running)
        cache = cache._replace(lengths=cache.lengths + count)
        states.append(hidden)
    return model.logits(jnp.concatenate(states, axis=1))


def last_four(values, lengths):
    return np.stack([row[n - 4 : n] for row, n in zip(np.asarray(values), lengths, strict=True)])


@SIZES
def test_cached_steps_are_the_full_forward_pass(x64, moe, monkeypatch):
    """Of rows of several lengths, read from the cache in three blocks of columns."""
    monkeypatch.setattr("occ.models.cache.CACHE_BLOCK", 4)
    config = small_config(moe=moe, num_layers=3, qk_norm=True, rotary_fraction=0.5)
    model, lengths = random_model(config), [6, 9, 7]
    inputs = rows(config, lengths, 9)
    got = extended(*model, inputs[0], jnp.array(lengths, jnp.int32))
    expected = last_four(full_logits(*model, *inputs), lengths)
    np.testing.assert_allclose(got, expected, atol=1e-10)


@pytest.mark.standard_promotion  # jax.nn.dot_product_attention mixes dtypes
def test_bfloat16_cache_is_near_the_full_forward_pass():
    config = small_config(dtype="float32", compute_dtype="bfloat16")
    model, lengths = random_model(config), [6, 7]
    inputs = rows(config, lengths, 7)
    assert merge_model(*model).empty_cache(2, 7).stacks[0].keys.dtype == jnp.dtype("bfloat16")
    got = np.asarray(extended(*model, inputs[0], jnp.array(lengths, jnp.int32)))
    expected = last_four(full_logits(*model, *inputs), lengths)
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


# -- responses --------------------------------------------------------------------------------


@SIZES
def test_greedy_is_the_argmax_step_by_step(moe):
    config = small_config(dtype="float32", moe=moe)
    model = random_model(config)
    tokens, mask = prompts(config)
    got = sample(
        Policy(config, *model[1:]), tokens, mask, KEY, config=SamplingConfig(NEW, temperature=0.0)
    )
    sequences, positions, segment_ids = whole(got, mask)
    logits = np.asarray(full_logits(*model, sequences, positions, segment_ids))
    np.testing.assert_array_equal(sequences[:, PROMPT:], logits[:, PROMPT - 1 : -1].argmax(-1))
    np.testing.assert_array_equal(got.lengths, [NEW] * 3)
    assert not got.finished.any()
    assert got.response_mask[:, PROMPT:].all() and not got.response_mask[:, :PROMPT].any()
    assert (np.asarray(got.log_prob) == 0).all()
    np.testing.assert_array_equal(sequences[:, :PROMPT], np.where(mask, tokens, 0))


@pytest.mark.parametrize(
    ("moe", "settings"),
    [
        (None, {}),
        (None, {"temperature": 1.5, "top_k": 6, "top_p": 0.6}),
        (MOE, {}),
        (MOE, {"temperature": 0.7}),
    ],
    ids=["dense", "dense, restricted", "moe", "moe, cooler"],
)
def test_log_prob_is_that_of_the_distribution_drawn_from(moe, settings):
    config = small_config(dtype="float32", moe=moe)
    model = random_model(config)
    tokens, mask = prompts(config)
    sampling = SamplingConfig(NEW, **settings)
    got = sample(Policy(config, *model[1:]), tokens, mask, KEY, config=sampling)
    sequences, positions, segment_ids = whole(got, mask)
    logits = np.asarray(full_logits(*model, sequences, positions, segment_ids))
    assert got.log_prob.dtype == jnp.float32
    assert (np.asarray(got.log_prob)[:, :PROMPT] == 0).all()
    for row in range(3):
        for t in range(PROMPT, PROMPT + NEW):
            expected = log_softmax(logits[row, t - 1])
            if settings:
                expected = restricted_by_loop(logits[row, t - 1], sampling)
            expected = expected[sequences[row, t]]
            np.testing.assert_allclose(got.log_prob[row, t], expected, atol=1e-4)


def test_a_stop_token_ends_its_row():
    """What greedy decoding says third in the first row becomes a stop token."""
    config = small_config(dtype="float32")
    model = random_model(config)
    tokens, mask = prompts(config)
    free = sample(Policy(config, *model[1:]), tokens, mask, KEY, config=SamplingConfig(NEW))
    responses = np.asarray(free.tokens)[:, PROMPT:]
    stops = (int(responses[0, 2]), int(responses[1, 4]))
    sampling = SamplingConfig(NEW, stop_tokens=stops, pad_token=12)
    got = sample(Policy(config, *model[1:]), tokens, mask, KEY, config=sampling)
    lengths = []
    for row in range(3):
        at = [t for t in range(NEW) if responses[row, t] in stops]
        length = at[0] + 1 if at else NEW
        lengths.append(length)
        expected = np.full(NEW, 12)
        expected[:length] = responses[row, :length]
        np.testing.assert_array_equal(got.tokens[row, PROMPT:], expected)
        np.testing.assert_array_equal(got.response_mask[row, PROMPT:], np.arange(NEW) < length)
        assert got.finished[row] == bool(at)
        kept = np.where(np.arange(NEW) < length, np.asarray(free.log_prob)[row, PROMPT:], 0)
        np.testing.assert_allclose(got.log_prob[row, PROMPT:], kept, atol=1e-6)
    np.testing.assert_array_equal(got.lengths, lengths)
    assert min(lengths) < NEW
    assert (np.asarray(got.tokens)[:, :PROMPT][~np.asarray(mask)] == 12).all()


def test_a_stop_token_in_the_last_column_is_an_end():
    config = small_config(dtype="float32")
    model = random_model(config)
    tokens, mask = prompts(config)
    free = np.asarray(
        sample(Policy(config, *model[1:]), tokens, mask, KEY, config=SamplingConfig(NEW)).tokens
    )[0]
    first = next(n for n in range(1, NEW + 1) if free[PROMPT + n - 1] not in free[PROMPT:][: n - 1])
    last = int(free[PROMPT + first - 1])
    sampling = SamplingConfig(first, stop_tokens=(last,))
    got = sample(Policy(config, *model[1:]), tokens, mask, KEY, config=sampling)
    assert got.finished[0] and got.lengths[0] == first


def test_decoding_stops_when_all_rows_have_ended():
    """Every token is a stop token, so that one step must do."""
    config = small_config(dtype="float32")
    _, params, rest = random_model(config)
    tokens, mask = prompts(config)
    every = SamplingConfig(NEW, stop_tokens=tuple(range(config.vocab_size)))
    got = sample(Policy(config, params, rest), tokens, mask, KEY, config=every)
    assert got.work.steps == 1 and got.work.passes == 3
    np.testing.assert_array_equal(got.lengths, [1, 1, 1])
    assert got.finished.all()


def test_a_row_does_not_depend_on_the_others_or_on_padding():
    """On a model with a dense and a sparse layer."""
    config = small_config(dtype="float32", moe=MOE)
    model = random_model(config)
    sampling = SamplingConfig(NEW, stop_tokens=(3,))
    tokens, mask = prompts(config)
    got = sample(Policy(config, *model[1:]), tokens, mask, KEY, config=sampling)

    others, other_mask = prompts(config, (2, 1, 4), seed=5)
    others, other_mask = others.at[0].set(tokens[0]), other_mask.at[0].set(mask[0])
    again = sample(Policy(config, *model[1:]), others, other_mask, KEY, config=sampling)
    np.testing.assert_array_equal(again.tokens[0], got.tokens[0])
    np.testing.assert_allclose(again.log_prob[0], got.log_prob[0], atol=1e-5)

    wider = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=9)
    padded = sample(
        Policy(config, *model[1:]), wider, jnp.pad(mask, ((0, 0), (3, 0))), KEY, config=sampling
    )
    np.testing.assert_array_equal(padded.tokens[:, 3:], got.tokens)
    np.testing.assert_allclose(padded.log_prob[:, 3:], got.log_prob, atol=1e-5)


def test_rows_with_one_prompt_and_other_keys_differ():
    config = small_config(dtype="float32")
    model = random_model(config)
    tokens, _ = prompts(config)
    same = jnp.broadcast_to(tokens[1:2], (3, PROMPT))
    everywhere = jnp.ones((3, PROMPT), bool)
    got = np.asarray(
        sample(Policy(config, *model[1:]), same, everywhere, KEY, config=SamplingConfig(NEW)).tokens
    )
    assert len({tuple(row) for row in got}) == 3
    other = sample(
        Policy(config, *model[1:]), same, everywhere, jax.random.key(8), config=SamplingConfig(NEW)
    )
    assert (np.asarray(other.tokens) != got).any()


# -- drafts -----------------------------------------------------------------------------------

speculate = jax.jit(generate, static_argnames=("config", "slots", "draft_depth"))
WAITING = {"top_k": 2, "top_p": 0.9, "temperature": 0.7}


@pytest.mark.parametrize(
    ("heads", "depth", "slots", "settings"),
    [
        pytest.param(1, 3, 0, WAITING, marks=pytest.mark.slow),
        (2, 3, 2, {"stop_tokens": (2,)}),
        pytest.param(2, 1, 3, {"temperature": 0.0}, marks=pytest.mark.slow),
        pytest.param(
            "parallel", 2, 2, {"temperature": 1.5, "stop_tokens": (2,)}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_drafts_and_slots_change_no_token(x64, heads, depth, slots, settings):
    """Six samples of three prompts. With three tokens alone, many a draft is right by chance."""
    mtp = {"kind": "parallel" if heads == "parallel" else "sequential"}
    config = small_config(2 if heads == "parallel" else heads, vocab_size=3, mtp=mtp)
    policy = Policy(config, *random_model(config)[1:])
    tokens, mask = prompts(config, (1, 5, 3))
    which = jnp.array([0, 0, 1, 1, 1, 2], jnp.int32)
    sampling = SamplingConfig(14, pad_token=1, **settings)
    expected = sample(policy, tokens[which], mask[which], KEY, config=sampling)
    got = speculate(
        policy,
        tokens,
        mask,
        KEY,
        config=sampling,
        prompt_of=which,
        slots=slots,
        draft_depth=depth,
    )
    for name in ("tokens", "response_mask", "finished", "lengths"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose(got.log_prob, expected.log_prob, atol=1e-6)
    judged, kept = np.asarray(got.work.judged), np.asarray(got.work.kept)
    total = int(got.lengths.sum())
    assert judged[0] == got.work.passes < total == int(expected.work.passes)
    assert (kept > 0).all() and (kept < judged).any() and total <= judged[0] + kept.sum()
    assert got.work.steps >= -(-int(got.work.passes) // (slots or 6))


def keep_all(log_prob, noise, drafts, draft_log_prob, log_uniform):
    return choose_by_rejection(log_prob, noise, drafts, draft_log_prob, log_uniform - jnp.inf)


def from_all(log_prob, noise, drafts, draft_log_prob, log_uniform):
    """What stands instead of a refused draft is drawn from p, and not from what q lacks of it."""
    kept = log_uniform < log_prob_of(drafts, log_prob[:, :-1] - draft_log_prob)
    other = jnp.argmax(log_prob + noise, axis=-1).astype(jnp.int32)
    return other.at[:, :-1].set(jnp.where(kept, drafts, other[:, :-1]))


@pytest.mark.parametrize(
    "judged", [choose_by_rejection, keep_all, pytest.param(from_all, marks=pytest.mark.slow)]
)
def test_rejection_sampling_follows_the_distribution(x64, monkeypatch, judged):
    """Chi square over all responses of three tokens; two planted biases are far outside."""
    monkeypatch.setattr("occ.generation.decoding.choose_by_rejection", judged)
    config = small_config(2, vocab_size=3)
    model = random_model(config)
    tokens, mask = prompts(config, (3,))
    count, sampling = 20_000, SamplingConfig(3, temperature=0.8, speculation="rejection")
    got = jax.jit(functools.partial(generate, config=sampling, draft_depth=2, slots=5_000))(
        Policy(config, *model[1:]), tokens, mask, KEY, prompt_of=jnp.zeros(count, jnp.int32)
    )
    every = np.array(list(itertools.product(range(3), repeat=3)), np.int32)
    sequences = np.concatenate([np.repeat(np.asarray(tokens)[:, -3:], 27, 0), every], axis=1)
    ids = np.ones(sequences.shape, np.int32)
    logits = full_logits(*model, sequences, np.cumsum(ids, axis=1, dtype=np.int32) - 1, ids)
    log_prob = log_softmax(np.asarray(logits)[:, 2:5] / 0.8)
    log_prob = np.take_along_axis(log_prob, every[..., None], axis=-1)[..., 0]
    which = np.asarray(got.tokens)[:, -3:] @ [9, 3, 1]
    expected = count * np.exp(log_prob.sum(axis=1))
    chi_square = (((np.bincount(which, minlength=27) - expected) ** 2) / expected).sum()
    # 26 degrees of freedom: 64 is exceeded once in 20,000 times.
    assert chi_square < 64 if judged is choose_by_rejection else chi_square > 200
    np.testing.assert_allclose(got.log_prob[:, -3:], log_prob[which], atol=1e-6)
    kept, judged_drafts = np.asarray(got.work.kept), np.asarray(got.work.judged)
    assert (kept > 0).all() and (kept <= judged_drafts).all()


@functools.partial(jax.jit, static_argnums=0)
def drafts_of_the_whole(graphdef, params, rest, tokens, seen):
    """Three drafts of two modules after the first `seen` + 1 tokens, by forward passes over all."""
    model = merge_model(graphdef, params, rest)
    time = tokens.shape[1]
    positions = jnp.arange(time, dtype=jnp.int32)[None]
    segment_ids = jnp.ones_like(tokens)
    inputs = tokens, positions, segment_ids
    hidden = model.trunk(*inputs).hidden
    first = model.mtp_hidden(hidden, *inputs)[0]

    def best(state, head, at):
        return jnp.argmax(model.mtp_logits(state, head)[0, at]).astype(jnp.int32)

    tokens = tokens.at[0, seen + 1].set(best(first, 0, seen - 1))
    second = model.mtp_hidden(hidden, tokens, *inputs[1:])[1]
    tokens = tokens.at[0, seen + 2].set(best(second, 1, seen - 1))
    fed = first.at[0, seen].set(second[0, seen - 1])
    ahead = model.embedding(tokens_ahead(tokens, segment_ids, 2))
    third = model.mtp[1](fed, ahead, Context(positions, segment_ids)).hidden
    return jnp.stack([tokens[0, seen + 1], tokens[0, seen + 2], best(third, 1, seen)])


def test_drafts_are_those_of_a_full_forward_pass(x64, monkeypatch):
    """Whatever was drafted and refused before: the modules' cache holds what is decided."""
    config = small_config(2)
    model = random_model(config)
    tokens, mask = prompts(config, (3, 5))
    steps = []

    def recording(tokens, drafts, room, running, config):
        jax.debug.callback(lambda *seen: steps.append(seen), drafts, room, running, ordered=True)
        return judge(tokens, drafts, room, running, config)

    monkeypatch.setattr("occ.generation.decoding.judge", recording)
    sampling = SamplingConfig(8, temperature=0.0)
    got = jax.jit(functools.partial(generate, config=sampling, draft_depth=3))(
        Policy(config, *model[1:]), tokens, mask, KEY
    )
    jax.effects_barrier()
    compared = 0
    for drafts, room, running in steps:
        for row in np.flatnonzero(running):
            decided = np.asarray(got.tokens)[row, PROMPT - (3, 5)[row] :]
            seen = (3, 5)[row] + 8 - int(room[row]) - 1
            sequence = np.zeros((1, PROMPT + 8 + 3), np.int32)
            sequence[0, : seen + 1] = decided[: seen + 1]
            expected = drafts_of_the_whole(*model, sequence, seen)
            np.testing.assert_array_equal(drafts[row], expected)
            compared += 1
    assert compared == got.work.passes > 8


@pytest.mark.parametrize(
    ("mtp", "depth", "match"),
    [
        ({"num_modules": 0}, 1, "draft_depth=1 needs MTP modules"),
        ({"kind": "parallel"}, 2, "draft_depth=2 exceeds the model's 1 parallel heads"),
    ],
    ids=str,
)
def test_what_cannot_be_drafted_is_refused(mtp, depth, match):
    with pytest.raises(ValueError, match=match):
        check_depth(MTPConfig(**mtp), depth)


# -- one token --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.5}],
    ids=str,
)
def test_frequencies_are_the_probabilities(settings):
    """20,000 draws: a probability's standard error is at most 0.0036, and 0.015 is 4 of them."""
    config = SamplingConfig(1, **settings)
    row = np.array([0.3, 1.2, -0.5, 0.9, -3.0], np.float32)
    count = 20_000
    logits = jnp.broadcast_to(jnp.asarray(row), (count, 5))

    @jax.jit
    def draw(logits):
        noise = gumbel_noise(KEY, jnp.arange(count), jnp.full(count, 3), (1, 5), logits.dtype)
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(KEY, n), 3))(
            jnp.arange(count)
        )
        restricted = restrict(logits / config.temperature, config)
        usual = jax.vmap(jax.random.categorical)(keys, jax.nn.log_softmax(restricted))
        return *choose(logits, noise[:, 0], config), usual

    token, log_prob, usual = draw(logits)
    np.testing.assert_array_equal(token, usual)
    expected = restricted_by_loop(row, config)
    np.testing.assert_allclose(log_prob, expected[np.asarray(token)], atol=1e-5)
    frequency = np.bincount(token, minlength=5) / count
    np.testing.assert_allclose(frequency, np.exp(expected), atol=0.015)
    assert (frequency[np.isneginf(expected)] == 0).all()


@pytest.mark.parametrize("top_k", [0, 1, 4, 99])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_restriction_by_loop(top_k, top_p):
    config = SamplingConfig(1, top_k=top_k, top_p=top_p)
    logits = np.random.default_rng(2).normal(size=(20, 7)).astype(np.float32) * 2
    logits[:10] = np.round(logits[:10]) + 0.0  # many are equal, and none is -0
    kept = np.isfinite(restrict(jnp.asarray(logits), config))
    expected = np.isfinite([restricted_by_loop(row, config) for row in logits])
    np.testing.assert_array_equal(kept, expected)
    assert kept.any(axis=1).all()
    changed = np.asarray(restrict(jnp.asarray(logits), config))
    np.testing.assert_array_equal(changed[kept], logits[kept])


# -- errors -----------------------------------------------------------------------------------


def test_check_fits():
    config = SamplingConfig(4)
    good = np.array([[False, False, True], [True, True, True]])
    check_fits(good, 7, config)
    check_fits(jnp.asarray(good), 7, config)
    with pytest.raises(ValueError, match=r"3 columns and 4 new tokens make 7, which exceeds .* 6"):
        check_fits(good, 6, config)
    for bad in ([False, False, False], [True, True, False], [True, False, True]):
        with pytest.raises(ValueError, match="left-padded"):
            check_fits(np.array([bad, [True, True, True]]), 7, config)


def test_generation_past_the_context_raises():
    config = small_config(dtype="float32", max_length=PROMPT + NEW - 1)
    tokens, mask = prompts(config)
    with pytest.raises(ValueError, match="exceed the context of max_length=10"):
        sample(
            Policy(config, *random_model(config)[1:]), tokens, mask, KEY, config=SamplingConfig(NEW)
        )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"temperature": -0.1}, "temperature >= 0"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
    ],
    ids=str,
)
def test_bad_settings_raise(settings, match):
    with pytest.raises(ValueError, match=match):
        SamplingConfig(**({"max_new_tokens": 3} | settings))


# -- as the host calls it ---------------------------------------------------------------------


def test_a_sampler_leaves_out_columns_and_samples_the_same(x64):
    """Three samples of four prompts in twelve columns, of which the longest prompt takes five."""
    config = small_config(1)
    policy = Policy(config, *random_model(config)[1:])
    tokens, mask = prompts(config, (5, 1, 4, 2), columns=12)
    sampling = SamplingConfig(NEW, stop_tokens=(3, 5), pad_token=12)
    each = jnp.repeat(jnp.arange(4), 3)
    expected = sample(policy, tokens[each], mask[each], KEY, config=sampling)
    program = functools.partial(speculate, config=sampling, slots=2)
    got = Sampler(program, True, 12)(policy, tokens, mask, KEY, 3)
    for name in ("tokens", "response_mask", "finished", "lengths"):
        assert getattr(got, name).dtype == getattr(expected, name).dtype
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose(got.log_prob, expected.log_prob, atol=1e-6)
    assert len(set(got.lengths.tolist())) > 1
    places = 4 * 6 + 2 * int(got.work.steps)
    assert padding_waste(mask, got.work) == pytest.approx(1 - (12 + got.lengths.sum()) / places)


def test_portions_are_sorted_whole_and_narrow():
    rng = np.random.default_rng(3)
    for batch, columns, size in ((1, 5, 3), (7, 9, 2), (20, 30, 6), (20, 2, 20)):
        lengths = rng.integers(1, columns + 1, batch)
        cut = portions(lengths, columns, size)
        assert {portion.rows.size for portion in cut} == {min(size, batch)}
        assert set(np.concatenate([portion.rows for portion in cut])) == set(range(batch))
        step = -(-columns // COLUMN_RUNGS)
        for portion in cut:
            longest = lengths[portion.rows].max()
            assert longest <= portion.columns <= min(longest + step - 1, columns)
        widths = [portion.columns for portion in cut]
        assert widths == sorted(widths) and len(set(widths)) <= COLUMN_RUNGS
