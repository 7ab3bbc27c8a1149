"""What `experiments.instruments.same_tokens` says of rows that differ."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.instruments import engine_reward, rollout_speed, same_tokens
from occ.generation.decoding import generate
from occ.generation.sampling import SamplingConfig
from tests import tiny

ROWS, PROMPT = 4, 3


@pytest.fixture(scope="module")
def setting():
    tokens = np.random.default_rng(0).integers(1, 11, (ROWS, PROMPT)).astype(np.int32)
    mask = np.array([[True] * 3, [False, True, True], [True] * 3, [False, False, True]])
    policy = tiny.new_policy(tiny.model_config())
    return types.SimpleNamespace(policy=policy, prompts=lambda count: (tokens, mask))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("most likely", marks=pytest.mark.slow),
        "temperature 0.7, top-p 0.9",
        pytest.param("temperature 1", marks=pytest.mark.slow),
    ],
)
def test_a_token_that_is_not_drawn_is_behind_the_one_that_is(setting, name, monkeypatch):
    """The drawn token decides by the score that is looked at, so no other may come before it."""
    monkeypatch.setattr(same_tokens, "SAMPLES", 1)
    sampling = SamplingConfig(5, **same_tokens.SAMPLINGS[name])
    prompts = map(jnp.asarray, setting.prompts(ROWS))
    sampled = generate(setting.policy, *prompts, jax.random.key(0), config=sampling)
    plain = np.asarray(sampled.tokens)
    assert same_tokens.gaps(setting, sampling, plain, plain) == []
    for column in (PROMPT, PROMPT + 3):
        for token in set(range(11)) - {plain[1, column]}:
            other = plain.copy()
            other[1, column] = token
            other[1, column + 1 :] = 0  # what comes after does not matter
            (ahead,) = same_tokens.gaps(setting, sampling, plain, other)
            assert ahead > same_tokens.TIE


def test_a_token_beyond_an_edge_is_as_far_as_it_would_have_to_come():
    log_prob = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    nucleus, top = SamplingConfig(1, top_p=0.7), SamplingConfig(1, top_k=1)
    assert same_tokens._beyond(log_prob, 2, nucleus) == pytest.approx(0.1)
    assert same_tokens._beyond(log_prob, 2, top) == pytest.approx(np.log(0.5 / 0.15))


def test_rows_that_are_no_ties_are_the_end(monkeypatch, tmp_path, capsys):
    for gaps, status in (([], 0), ([1e-5, -1e-5], 0), ([0.2], 1), ([float("nan")], 1)):
        found = {"temperature 1": {"drafts of 1": gaps}}
        monkeypatch.setattr(same_tokens, "check", lambda arguments, found=found: found)
        monkeypatch.setattr(sys, "argv", ["same_tokens", f"--folder={tmp_path}"])
        assert same_tokens.main() == status
        assert f"same_tokens: {len(gaps)} rows of 1 x 1000 differ" in capsys.readouterr().out


@pytest.mark.release
@pytest.mark.standard_promotion
def test_one_engine_under_two_keys_is_not_told_apart():
    """The comparison of rewards, whose unit is the prompt."""
    arguments = engine_reward.Arguments(config="arithmetic_easy", prompts=32, samples=8)
    found = engine_reward.measure(arguments)
    assert found["tokens"]["in_process"] != found["tokens"]["other"]  # other keys, other samples
    assert "tokens: in_process" in engine_reward.describe(found)
    for of in found.values():
        difference, half = of["difference"]
        assert abs(difference) <= 2 * half
    hot = found | {"reward": {"in_process": [0.5, 0.1], "other": [0.2, 0.1], "difference": [-1, 0]}}
    assert "(told apart)" in engine_reward.describe(hot).splitlines()[0]


def test_stop_tokens_make_the_mean_that_is_asked():
    """Of rows cut at the first of them, in tokens that have no order."""
    tokens = np.random.default_rng(3).integers(0, 500, (64, 60))
    for mean in (2.0, 7.0, 12.0):
        stops = rollout_speed.stops_of(tokens, 500, mean)
        ends = np.isin(tokens, stops)
        lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, tokens.shape[1])
        assert abs(lengths.mean() - mean) < 0.1 * mean
