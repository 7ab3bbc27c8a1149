"""What `experiments.instruments.same_tokens` says of rows that differ."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.instruments import same_tokens
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


@pytest.mark.parametrize("name", ["most likely", "temperature 0.7, top-p 0.9", "temperature 1"])
def test_a_token_that_is_not_drawn_is_behind_the_one_that_is(setting, name):
    """The drawn token decides by the score that is looked at, so no other may come before it."""
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
