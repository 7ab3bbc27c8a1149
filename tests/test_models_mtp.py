"""MTP modules: reference agreement in every variant, causality ahead, layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ.models.decoder import merge_model
from occ.models.mtp import tokens_ahead
from tests import reference_models as reference
from tests.reference_models import MOE, random_model, rows, small_config

SEQUENTIAL = {
    "plain": {},
    "hidden_after_final_norm": {"hidden_after_final_norm": True},
    "embedding_hidden": {"concatenation": "embedding_hidden"},
    "shared final norm": {"own_final_norm": False},
    "zero_first_embedding": {"zero_first_embedding": True},
    "all": {
        "hidden_after_final_norm": True,
        "concatenation": "embedding_hidden",
        "own_final_norm": False,
        "zero_first_embedding": True,
    },
}
PARALLEL = {
    "parallel": {"kind": "parallel"},
    "parallel after norm": {"kind": "parallel", "hidden_after_final_norm": True},
    "parallel shared norm": {"kind": "parallel", "own_final_norm": False},
}
VARIANTS = SEQUENTIAL | PARALLEL
KINDS = pytest.mark.parametrize("kind", ["sequential", "parallel"])


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, rest, tokens, positions, segment_ids):
    return merge_model(graphdef, params, rest)(tokens, positions, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def mtp_states(graphdef, params, rest, tokens, positions, segment_ids):
    model = merge_model(graphdef, params, rest)
    hidden = model.trunk(tokens, positions, segment_ids).hidden
    return model.mtp_hidden(hidden, tokens, positions, segment_ids)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_modules_are_the_references(x64, changes):
    config = small_config(2, mtp=changes)
    model = random_model(config)
    inputs = reference.packed([5, 3], 9, config)
    expected = reference.forward(*model[1:], config, *inputs)
    main, ahead = forward(*model, *inputs)
    np.testing.assert_allclose(main, expected.logits, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ahead, expected.mtp_logits, rtol=0, atol=1e-10)
    np.testing.assert_allclose(mtp_states(*model, *inputs), expected.mtp_hidden, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_three_untied_sparse_modules_are_the_references(x64, side):
    config = small_config(3, moe=MOE, tied_embeddings=False, qk_norm=True)
    model = random_model(config)
    inputs = rows(config, [6, 4], 6, side)
    expected = reference.forward(*model[1:], config, *inputs)
    _, ahead = forward(*model, *inputs)
    np.testing.assert_allclose(ahead, expected.mtp_logits, rtol=0, atol=1e-10)


def with_weights_of(params, changes):
    """The logits of a variant whose weights are those of the plain modules, by name."""
    config = small_config(2, mtp=changes)
    graphdef, fresh, rest = random_model(config)
    given = {
        jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    chosen = jax.tree_util.tree_map_with_path(lambda p, _: given[jax.tree_util.keystr(p)], fresh)
    return forward(graphdef, chosen, rest, *rows(config, [6], 6))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_each_field_changes_the_modules_and_not_the_main_head(x64, name):
    """The weights are the same: only what is done with them differs."""
    params = random_model(small_config(2))[1]
    base = "parallel" if name.startswith("parallel ") else "plain"
    main, ahead = with_weights_of(params, VARIANTS[base])
    other_main, other_ahead = with_weights_of(params, VARIANTS[name])
    np.testing.assert_array_equal(main, other_main)
    for k in range(2):
        assert np.abs(other_ahead[k] - ahead[k]).max() > 1e-3


def test_no_modules_give_no_logits():
    config = small_config(0, dtype="float32")
    model = random_model(config)
    main, ahead = forward(*model, *rows(config, [4], 4))
    assert "mtp" not in model[1]
    assert ahead.shape == (0, *main.shape)


@KINDS
def test_a_token_changes_nothing_that_may_not_see_it(x64, kind):
    """Sequential module k at source i has seen token i + k; a parallel head token i alone."""
    config = small_config(3, mtp={"kind": kind})
    model = random_model(config)
    time = 8
    tokens, positions, segment_ids = rows(config, [time], time)
    _, before = forward(*model, tokens, positions, segment_ids)
    before = np.asarray(before)
    for j in range(time):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % config.vocab_size
        after = np.asarray(forward(*model, changed, positions, segment_ids)[1])
        for k in (1, 2, 3):
            first = max(j - k, 0) if kind == "sequential" else j
            np.testing.assert_array_equal(after[k - 1, :, :first], before[k - 1, :, :first])
            difference = np.abs(after[k - 1, 0, first:] - before[k - 1, 0, first:]).max(axis=-1)
            assert (difference > 1e-9).all(), (j, k)


@KINDS
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_packed_sequences_have_the_logits_of_separate_rows(x64, kind, moe):
    config = small_config(2, mtp={"kind": kind}, moe=moe)
    model = random_model(config)
    lengths = [5, 1, 4]
    tokens, positions, segment_ids = reference.packed(lengths, 12, config)
    together = forward(*model, tokens, positions, segment_ids)[1]
    start = 0
    for length in lengths:
        alone_inputs = rows(config, [length], 6)
        alone_inputs[0][0, :length] = tokens[0, start : start + length]
        alone = forward(*model, *alone_inputs)[1][:, 0, :length]
        got = together[:, 0, start : start + length]
        np.testing.assert_allclose(got, alone, rtol=0, atol=1e-12)
        start += length


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_changes_nothing(x64, kind, side):
    config = small_config(2, mtp={"kind": kind, "zero_first_embedding": True})
    model = random_model(config)
    tokens, positions, segment_ids = rows(config, [4, 6], 7, side)
    present = segment_ids > 0
    other = np.where(present, tokens, (tokens + 1) % config.vocab_size)
    before = np.asarray(forward(*model, tokens, positions, segment_ids)[1])
    after = np.asarray(forward(*model, other, positions, segment_ids)[1])
    np.testing.assert_array_equal(after[:, present], before[:, present])


@KINDS
def test_a_modules_loss_reaches_the_modules_that_it_is_made_of(kind):
    """Module 2's gradient passes through module 1 where they are a chain, and not otherwise."""
    config = small_config(2, dtype="float32", mtp={"kind": kind})
    graphdef, params, rest = random_model(config)
    inputs = rows(config, [6], 6)

    def loss(params):
        return jnp.sum(jnp.sin(forward(graphdef, params, rest, *inputs)[1][1]))

    gradient = jax.grad(loss)(params)

    def size(tree):
        return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))

    assert size(gradient["mtp"]["1"]) > 0
    assert size(gradient["layers"]) > 0
    assert (size(gradient["mtp"]["0"]["block"]) > 0) == (kind == "sequential")
    assert size(gradient["mtp"]["0"]["final_norm"]) == 0


@pytest.mark.parametrize("depth", [0, 1, 2, 5, 9])
def test_tokens_ahead_by_loop(depth):
    config = small_config()
    tokens, _, segment_ids = reference.packed([4, 2], 8, config)
    tokens = tokens + 1
    expected = np.zeros_like(tokens)
    for i in range(8):
        if i + depth < 8 and segment_ids[0, i] == segment_ids[0, i + depth]:
            expected[0, i] = tokens[0, i + depth]
    got = tokens_ahead(jnp.asarray(tokens), jnp.asarray(segment_ids), depth)
    np.testing.assert_array_equal(got, expected)
