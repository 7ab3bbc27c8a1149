"""MTP modules: reference agreement in every variant, causality ahead, layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ.models.decoder import merge_model
from occ.models.mtp import tokens_ahead
from tests import reference_models as reference
from tests.reference_models import MOE, random_model, rows, run, small_config

SEQUENTIAL = {
    "plain": {},
    "hidden_after_final_norm": {"hidden_after_final_norm": True},
    "embedding_hidden": {"concatenation": "embedding_hidden"},
    "shared final norm": {"own_final_norm": False},
    "zero_first_embedding": {"zero_first_embedding": True},
    "own embedding": {"own_embedding": True},
    "own output head": {"own_output_head": True},
    "all": {
        "hidden_after_final_norm": True,
        "concatenation": "embedding_hidden",
        "own_final_norm": False,
        "zero_first_embedding": True,
        "own_embedding": True,
        "own_output_head": True,
    },
}
PARALLEL = {
    "parallel": {"kind": "parallel"},
    "parallel after norm": {"kind": "parallel", "hidden_after_final_norm": True},
    "parallel shared norm": {"kind": "parallel", "own_final_norm": False},
    "parallel own output head": {"kind": "parallel", "own_output_head": True},
}
VARIANTS = SEQUENTIAL | PARALLEL
KINDS = {"sequential": {}, "parallel": {"kind": "parallel"}}
BOTH_KINDS = pytest.mark.parametrize("kind", KINDS)


TIME = 9  # of all inputs, so that they share compilations


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_modules_are_the_references(x64, changes):
    config = small_config(2, mtp=changes)
    model = random_model(config)
    inputs = reference.packed([5, 3], TIME, config)
    expected = reference.forward(*model[1:], config, *inputs)
    got = run(*model, *inputs)
    np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-10)
    np.testing.assert_allclose(got.mtp_logits, expected.mtp_logits, rtol=0, atol=1e-10)
    np.testing.assert_allclose(got.mtp_hidden, expected.mtp_hidden, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_three_untied_sparse_modules_are_the_references(x64, side):
    config = small_config(3, moe=MOE, tied_embeddings=False, qk_norm=True)
    model = random_model(config)
    inputs = rows(config, [6, 4], TIME, side)
    expected = reference.forward(*model[1:], config, *inputs)
    ahead = run(*model, *inputs).mtp_logits
    np.testing.assert_allclose(ahead, expected.mtp_logits, rtol=0, atol=1e-10)


def with_weights_of(params, changes):
    """The logits of a variant whose weights are, by name, those of the plain modules."""
    config = small_config(2, mtp=changes)
    graphdef, fresh, rest = random_model(config)
    given = {
        jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    chosen = jax.tree_util.tree_map_with_path(
        lambda p, leaf: given.get(jax.tree_util.keystr(p), leaf), fresh
    )
    output = run(graphdef, chosen, rest, *rows(config, [6, 9], TIME))
    return output.logits, output.mtp_logits


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_each_field_changes_the_modules_and_not_the_main_head(x64, name):
    """The weights are the same: only what is done with them differs, or whose they are."""
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
    output = run(*model, *rows(config, [4, 4], TIME))
    assert "mtp" not in model[1]
    assert output.mtp_logits.shape == (0, *output.logits.shape)


@BOTH_KINDS
def test_a_token_changes_nothing_that_may_not_see_it(x64, kind):
    """Sequential module k at source i has seen token i + k; a parallel head token i alone."""
    config = small_config(2, mtp=KINDS[kind])
    model = random_model(config)
    tokens, positions, segment_ids = rows(config, [TIME, TIME], TIME)
    before = np.asarray(run(*model, tokens, positions, segment_ids).mtp_logits)
    for j in range(TIME):
        changed = tokens.copy()
        changed[:, j] = (changed[:, j] + 1) % config.vocab_size
        after = np.asarray(run(*model, changed, positions, segment_ids).mtp_logits)
        for k in (1, 2):
            first = max(j - k, 0) if kind == "sequential" else j
            np.testing.assert_array_equal(after[k - 1, :, :first], before[k - 1, :, :first])
            difference = np.abs(after[k - 1, :, first:] - before[k - 1, :, first:]).max(axis=-1)
            assert (difference > 1e-9).all(), (j, k)


@BOTH_KINDS
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_packed_sequences_have_the_logits_of_separate_rows(x64, kind, moe):
    config = small_config(2, mtp=KINDS[kind], moe=moe)
    model = random_model(config)
    lengths = [4, 1, 3]
    tokens, positions, segment_ids = reference.packed(lengths, TIME, config)
    together = run(*model, tokens, positions, segment_ids).mtp_logits
    start = 0
    for length in lengths:
        alone_inputs = rows(config, [length] * 2, TIME)
        alone_inputs[0][:, :length] = tokens[:, start : start + length]
        alone = run(*model, *alone_inputs).mtp_logits[:, :, :length]
        got = together[:, :, start : start + length]
        np.testing.assert_allclose(got, alone, rtol=0, atol=1e-12)
        start += length


@BOTH_KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_changes_nothing(x64, kind, side):
    config = small_config(2, mtp=KINDS[kind])
    model = random_model(config)
    tokens, positions, segment_ids = rows(config, [4, 6], TIME, side)
    present = segment_ids > 0
    other = np.where(present, tokens, (tokens + 1) % config.vocab_size)
    before = np.asarray(run(*model, tokens, positions, segment_ids).mtp_logits)
    after = np.asarray(run(*model, other, positions, segment_ids).mtp_logits)
    np.testing.assert_array_equal(after[:, present], before[:, present])


@BOTH_KINDS
def test_a_modules_loss_reaches_the_modules_that_it_is_made_of(kind):
    """Module 2's gradient passes through module 1 where they are a chain, and not otherwise."""
    config = small_config(2, dtype="float32", mtp=KINDS[kind])
    graphdef, params, rest = random_model(config)
    inputs = [jnp.asarray(a) for a in rows(config, [6, 6], TIME)]

    def loss(params):
        return jnp.sum(jnp.sin(merge_model(graphdef, params, rest)(*inputs)[1][1]))

    gradient = jax.jit(jax.grad(loss))(params)

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
            expected[:, i] = tokens[:, i + depth]
    got = tokens_ahead(jnp.asarray(tokens), jnp.asarray(segment_ids), depth)
    np.testing.assert_array_equal(got, expected)
