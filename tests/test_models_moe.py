"""The mixture of experts: reference agreement, load, and the router's correction bias."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ.models.config import MoEConfig
from occ.models.decoder import merge_model
from occ.models.moe import update_router_bias
from tests import reference_models as reference
from tests.reference_models import MOE, random_model, rows, small_config

VARIANTS = {
    "one shared": MOE,
    "no shared": dataclasses.replace(MOE, num_shared_experts=0),
    "two shared, scaled": dataclasses.replace(MOE, num_shared_experts=2, routed_scaling=2.5),
    "raw gates": dataclasses.replace(MOE, normalise_top_k=False, experts_per_token=3),
    "groups": dataclasses.replace(MOE, num_groups=3, top_groups=2, experts_per_token=3),
    "groups of one": dataclasses.replace(MOE, num_groups=6, top_groups=3),
    "all experts": dataclasses.replace(MOE, experts_per_token=6),
    "no dense layer": dataclasses.replace(MOE, first_dense_layers=0),
}


@functools.partial(jax.jit, static_argnums=0)
def trunk(graphdef, params, rest, tokens, positions, segment_ids):
    return merge_model(graphdef, params, rest).trunk(tokens, positions, segment_ids)


@pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS)
def test_trunk_and_load_are_the_references(x64, moe):
    config = small_config(moe=moe)
    model = random_model(config)
    inputs = reference.packed([5, 4], 12, config)
    expected = reference.forward(*model[1:], config, *inputs)
    got = trunk(*model, *inputs)
    np.testing.assert_allclose(got.hidden, expected.hidden, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(got.router_load, expected.load)


@pytest.mark.parametrize("side", ["left", "right"])
def test_load_counts_each_token_k_times_and_padding_never(side):
    config = small_config(dtype="float32", num_layers=3, moe=VARIANTS["groups"])
    model = random_model(config)
    lengths = [2, 6, 3]
    tokens, positions, segment_ids = rows(config, lengths, 6, side)
    load = trunk(*model, tokens, positions, segment_ids).router_load
    assert load.shape == (2, 6) and load.dtype == jnp.float32
    np.testing.assert_array_equal(np.sum(load, axis=1), [sum(lengths) * 3] * 2)
    other = np.where(segment_ids > 0, tokens, (tokens + 5) % config.vocab_size)
    again = trunk(*model, other, positions, segment_ids).router_load
    np.testing.assert_array_equal(again, load)


def test_a_dense_model_has_no_load():
    config = small_config(dtype="float32")
    assert trunk(*random_model(config), *rows(config, [3], 3)).router_load is None


# -- one layer --------------------------------------------------------------------------------


def layer(moe, bias=None, dtype="float32"):
    """The mixture of a two-layer model's module, alone, with its variables."""
    graphdef, params, rest = random_model(small_config(1, dtype, moe=moe))
    if bias is not None:
        rest = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(bias), leaf.shape), rest)
    return merge_model(graphdef, params, rest).mtp[0].block.mlp


def tokens_like(dtype=np.float32, count=7, width=12):
    return jnp.asarray(np.random.default_rng(3).normal(size=(1, count, width)), dtype)


def test_router_bias_moves_the_choice():
    bias = np.zeros(6, np.float32)
    bias[4] = 10.0
    x = tokens_like()
    experts, _ = layer(MOE, bias)._route(x[0])
    assert (experts == 4).any(axis=-1).all()
    experts, _ = layer(MOE, -bias)._route(x[0])
    assert not (experts == 4).any()


@pytest.mark.parametrize("normalise", [True, False])
def test_router_bias_leaves_the_gates(normalise):
    """A bias that keeps the choice keeps the gates: they are made of the scores alone."""
    moe = dataclasses.replace(MOE, experts_per_token=6, normalise_top_k=normalise)
    x = tokens_like()
    bias = np.linspace(-1, 1, 6).astype(np.float32)

    def gates(bias):
        experts, gates = layer(moe, bias)._route(x[0])
        return np.take_along_axis(np.asarray(gates), np.argsort(experts, axis=-1), axis=-1)

    plain = gates(np.zeros(6, np.float32))
    np.testing.assert_allclose(gates(bias), plain, rtol=1e-6)
    scores = jax.nn.sigmoid(x[0] @ layer(moe).router[...])
    expected = scores / scores.sum(axis=-1, keepdims=True) if normalise else scores
    np.testing.assert_allclose(plain, expected, rtol=1e-5)


def test_groups_bound_the_choice():
    """With the best group alone, all chosen experts are of one group."""
    moe = dataclasses.replace(MOE, num_groups=3, top_groups=1)
    experts, _ = layer(moe)._route(tokens_like(count=20)[0])
    group = np.asarray(experts) // 2
    assert (group == group[:, :1]).all()
    assert len(np.unique(group)) > 1


def test_a_token_s_output_does_not_depend_on_the_others():
    """No capacity, so no token is dropped: not even where all choose the same experts."""
    bias = np.array([9, 9, 0, 0, 0, 0], np.float32)
    mixture = layer(MOE, bias)
    x = tokens_like(count=9)
    valid = jnp.ones((1, 9), bool)
    together, load = mixture(x, valid)
    np.testing.assert_array_equal(load, [9, 9, 0, 0, 0, 0])
    for t in (0, 4, 8):
        alone, _ = mixture(x[:, t : t + 1], valid[:, :1])
        np.testing.assert_allclose(together[:, t : t + 1], alone, atol=1e-5)


def test_padding_visits_shared_experts_alone():
    moe = dataclasses.replace(MOE, num_shared_experts=0)
    valid = jnp.asarray([[True, False, True, False]])
    y, load = layer(moe)(tokens_like(count=4), valid)
    assert (np.asarray(y)[0, [1, 3]] == 0).all()
    assert (np.abs(np.asarray(y)[0, [0, 2]]).max(axis=-1) > 0).all()
    assert load.sum() == 4


def test_nothing_but_padding_gives_no_load():
    config = small_config(dtype="float32", moe=MOE)
    tokens, positions, segment_ids = rows(config, [0, 0], 3)
    output = trunk(*random_model(config), tokens, positions, segment_ids)
    np.testing.assert_array_equal(output.router_load, np.zeros((1, 6)))
    assert np.isfinite(output.hidden).all()


def test_router_is_trained_through_the_gates_and_its_bias_not_at_all():
    config = small_config(dtype="float32", moe=MOE)
    graphdef, params, rest = random_model(config)
    inputs = rows(config, [5], 5)

    def loss(params, rest):
        return jnp.sum(jnp.sin(trunk(graphdef, params, rest, *inputs).hidden))

    gradient, bias_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, rest)
    assert np.abs(gradient["layers"]["mlp"]["router"]).max() > 0
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(bias_gradient))
    assert "router_bias" not in str(jax.tree.structure(params))


# -- balancing --------------------------------------------------------------------------------


def test_update_router_bias_by_loop():
    rng = np.random.default_rng(0)
    bias = rng.normal(size=(3, 4)).astype(np.float32)
    load = rng.integers(0, 9, (3, 4)).astype(np.float32)
    load[0] = [2, 2, 2, 2]
    expected = bias.copy()
    for row in range(3):
        for e in range(4):
            mean = load[row].sum() / 4
            expected[row, e] += 0.1 * ((mean > load[row, e]) * 1.0 - (mean < load[row, e]) * 1.0)
    got = update_router_bias(jnp.asarray(bias), jnp.asarray(load), 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(got[0], bias[0])
    assert got.dtype == jnp.float32


def test_repeated_updates_balance_the_load():
    """From a bias that sends every token to one pair of experts."""
    graphdef, params, rest = random_model(small_config(1, "float32", moe=MOE))
    bias = jnp.asarray([3.0, 3.0, 0, 0, 0, 0], jnp.float32)
    x, valid = tokens_like(count=60), jnp.ones((1, 60), bool)

    @jax.jit
    def step(bias):
        filled = jax.tree.map(lambda leaf: jnp.broadcast_to(bias, leaf.shape), rest)
        _, load = merge_model(graphdef, params, filled).mtp[0].block.mlp(x, valid)
        return update_router_bias(bias, load, 0.02), load

    loads = []
    for _ in range(150):
        bias, load = step(bias)
        loads.append(np.asarray(load))
    np.testing.assert_array_equal(loads[0], [60, 60, 0, 0, 0, 0])
    assert loads[-1].max() < 30  # the mean is 20


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"experts_per_token": 0}, "experts_per_token must be between 1 and num_experts=6"),
        ({"experts_per_token": 7}, "experts_per_token must be between 1 and num_experts=6"),
        ({"num_groups": 4}, "do not fall into 4 equal groups"),
        ({"num_groups": 3, "top_groups": 4}, "of which 4 are chosen"),
        ({"num_groups": 3, "top_groups": 0}, "of which 0 are chosen"),
        (
            {"num_groups": 3, "top_groups": 1, "experts_per_token": 3},
            "exceeds the 2 experts in the chosen groups",
        ),
    ],
    ids=str,
)
def test_bad_configurations_raise(fields, match):
    with pytest.raises(ValueError, match=match):
        MoEConfig(**({"num_experts": 6, "experts_per_token": 2, "expert_width": 4} | fields))
