"""The mixture of experts: reference agreement, load, and the router's correction bias."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ.models.config import MoEConfig
from occ.models.decoder import merge_model
from occ.models.expert_parallel import ExpertWeights
from occ.models.moe import apply_experts, update_router_bias
from tests import reference_models as reference
from tests.reference_models import MOE, random_model, rows, run, small_config

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


SHAPES = (3, 4, 5), (3, 4, 5), (3, 5, 4)  # of three experts' kernels
TIME = 9  # of all inputs, so that they share compilations


@pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS)
def test_trunk_and_load_are_the_references(x64, moe):
    config = small_config(moe=moe)
    model = random_model(config)
    inputs = reference.packed([5, 2], TIME, config)
    expected = reference.forward(*model[1:], config, *inputs)
    got = run(*model, *inputs)
    np.testing.assert_allclose(got.hidden, expected.hidden, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(got.load, expected.load)


@pytest.mark.parametrize("side", ["left", "right"])
def test_load_counts_each_token_k_times_and_padding_never(side):
    config = small_config(dtype="float32", num_layers=3, moe=VARIANTS["groups"])
    model = random_model(config)
    lengths = [2, 6]
    tokens, positions, segment_ids = rows(config, lengths, TIME, side)
    load = run(*model, tokens, positions, segment_ids).load
    assert load.shape == (2, 6) and load.dtype == jnp.float32
    np.testing.assert_array_equal(np.sum(load, axis=1), [sum(lengths) * 3] * 2)
    other = np.where(segment_ids > 0, tokens, (tokens + 5) % config.vocab_size)
    again = run(*model, other, positions, segment_ids).load
    np.testing.assert_array_equal(again, load)


def test_a_dense_model_has_no_load():
    config = small_config(dtype="float32")
    assert run(*random_model(config), *rows(config, [3, 3], TIME)).load is None


# -- one layer --------------------------------------------------------------------------------


class LayerOutput(NamedTuple):
    y: np.ndarray  # [9, D]
    load: np.ndarray  # [E]
    experts: np.ndarray  # [9, k]
    gates: np.ndarray  # [9, k]


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef, params, rest, x, valid):
    mixture = merge_model(graphdef, params, rest).mtp[0].block.mlp
    routed = mixture(x[None], valid[None])
    return LayerOutput(routed.y[0], routed.load, *mixture._route(x, mixture._weights()))


def layer(moe, x, bias=None, valid=None):
    """A module's mixture on its own, with this correction bias."""
    graphdef, params, rest = random_model(small_config(1, "float32", moe=moe))
    if bias is not None:
        rest = jax.tree.map(lambda leaf: np.broadcast_to(bias, leaf.shape), rest)
    valid = np.ones(len(x), bool) if valid is None else valid
    return LayerOutput(*map(np.asarray, _apply(graphdef, params, rest, x, valid)))


def random_tokens(count=TIME):
    return np.random.default_rng(3).normal(size=(count, 12)).astype(np.float32)


def test_router_bias_moves_the_choice():
    bias = np.array([0, 0, 0, 0, 10, 0], np.float32)
    assert (layer(MOE, random_tokens(), bias).experts == 4).any(axis=-1).all()
    assert not (layer(MOE, random_tokens(), -bias).experts == 4).any()


@pytest.mark.parametrize("normalise", [True, False])
def test_router_bias_leaves_the_gates(normalise):
    """A bias that keeps the choice keeps the gates: they are made of the scores alone."""
    moe = dataclasses.replace(MOE, experts_per_token=6, normalise_top_k=normalise)
    x = random_tokens()

    def gates(bias):
        output = layer(moe, x, bias)
        return np.take_along_axis(output.gates, np.argsort(output.experts, axis=-1), axis=-1)

    plain = gates(np.zeros(6, np.float32))
    np.testing.assert_allclose(gates(np.linspace(-1, 1, 6).astype(np.float32)), plain, rtol=1e-6)
    _, params, _ = random_model(small_config(1, "float32", moe=moe))
    scores = 1 / (1 + np.exp(-x @ np.asarray(params["mtp"]["0"]["block"]["mlp"]["router"])))
    expected = scores / scores.sum(axis=-1, keepdims=True) if normalise else scores
    np.testing.assert_allclose(plain, expected, rtol=1e-5)


def test_groups_bound_the_choice():
    """With the best group alone, all chosen experts are of one group."""
    moe = dataclasses.replace(MOE, num_groups=3, top_groups=1)
    group = layer(moe, random_tokens(), np.zeros(6, np.float32)).experts // 2
    assert (group == group[:, :1]).all()
    assert len(np.unique(group)) > 1


def test_no_token_is_dropped_for_the_others():
    """No expert has a capacity: not even where all tokens choose the same."""
    bias = np.array([9, 9, 0, 0, 0, 0], np.float32)
    x = random_tokens()
    together = layer(MOE, x, bias)
    np.testing.assert_array_equal(together.load, [9, 9, 0, 0, 0, 0])
    for t in (0, 4, 8):
        only = np.arange(TIME) == t
        alone = layer(MOE, np.where(only[:, None], x, 5.0).astype(np.float32), bias, only)
        assert alone.load.sum() == 2
        np.testing.assert_allclose(together.y[t], alone.y[t], atol=1e-5)


def test_padding_visits_shared_experts_alone():
    moe = dataclasses.replace(MOE, num_shared_experts=0)
    valid = np.arange(TIME) % 3 > 0
    output = layer(moe, random_tokens(), valid=valid)
    assert (output.y[~valid] == 0).all()
    assert (np.abs(output.y[valid]).max(axis=-1) > 0).all()
    assert output.load.sum() == 2 * valid.sum()


def test_garbage_in_padding_stays_there():
    x, valid = random_tokens(), np.arange(TIME) < 5
    clean = layer(MOE, x, valid=valid)
    x[5:] = np.nan
    dirty = layer(MOE, x, valid=valid)
    np.testing.assert_array_equal(dirty.y[:5], clean.y[:5])
    np.testing.assert_array_equal(dirty.load, clean.load)


def test_few_rows_through_every_expert_are_the_grouped_product(x64):
    """As generation multiplies: rows of no expert, and one that is not finite, touch no other."""
    rng = np.random.default_rng(0)
    kernels = (jnp.asarray(rng.normal(size=shape)) for shape in SHAPES)
    weights = ExpertWeights(None, None, *kernels)
    x, expert = jnp.asarray(rng.normal(size=(7, 4))), jnp.array([2, 0, 3, 1, 1, 2, 3], jnp.int32)
    x = x.at[6].set(jnp.nan)
    grouped, through_all = (
        np.asarray(apply_experts(x, expert, weights, generating=few)) for few in (False, True)
    )
    np.testing.assert_allclose(through_all, grouped, atol=1e-12)
    assert (np.abs(grouped[[0, 1, 3, 4, 5]]).max(axis=1) > 0).all() and not grouped[[2, 6]].any()


def test_nothing_but_padding_gives_no_load():
    config = small_config(dtype="float32", moe=MOE)
    output = run(*random_model(config), *rows(config, [0, 0], TIME))
    np.testing.assert_array_equal(output.load, np.zeros((1, 6)))
    assert np.isfinite(output.hidden).all()


def test_router_is_trained_through_the_gates_and_its_bias_not_at_all():
    config = small_config(dtype="float32", moe=MOE)
    graphdef, params, rest = random_model(config)
    inputs = [jnp.asarray(a) for a in rows(config, [5, 5], TIME)]

    def loss(params, rest):
        return jnp.sum(jnp.sin(merge_model(graphdef, params, rest).trunk(*inputs).hidden))

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
    bias = np.array([3, 3, 0, 0, 0, 0], np.float32)
    x, loads = random_tokens(60), []
    for _ in range(150):
        load = layer(MOE, x, bias).load
        bias = np.asarray(update_router_bias(jnp.asarray(bias), jnp.asarray(load), 0.02))
        loads.append(load)
    np.testing.assert_array_equal(loads[0], [60, 60, 0, 0, 0, 0])
    assert loads[-1].max() < 30  # the mean is 20


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"experts_per_token": 0}, "experts_per_token must be > 0, got 0"),
        ({"experts_per_token": 7}, "experts_per_token must be between 1 and num_experts=6"),
        ({"num_groups": 4}, "do not fall into 4 equal groups"),
        ({"num_groups": 3, "top_groups": 4}, "of which 4 are chosen"),
        ({"num_groups": 3, "top_groups": 0}, "top_groups must be > 0, got 0"),
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
