"""The trunk and the main head: reference agreement, layout, precision, and the split."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from occ.models import layers
from occ.models.attention import Context, attend
from occ.models.config import MoEConfig, MTPConfig
from occ.models.decoder import Decoder, merge_model, split_model
from occ.training.batch import positions_from_segments
from tests import reference_models as reference
from tests import tiny
from tests.reference_models import MOE, random_model, rows, run, small_config

SIZES = pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])


KEY = jax.random.key(0)
TIME = 9  # of most inputs, so that they share compilations


def main_logits(*arguments):
    return np.asarray(run(*arguments).logits)


def norm_error(actual, expected):
    expected = np.asarray(expected, np.float64)
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    return difference / max(np.linalg.norm(expected), 1e-30)


FIELDS = {
    "biases": {"qkv_bias": True},
    "head norms": {"qk_norm": True},
    "partial rotary": {"rotary_fraction": 0.5},
    "rotary base": {"rope_base": 7.0},
    "epsilon": {"norm_epsilon": 0.5},
    "own head": {"tied_embeddings": False},
}
VARIANTS = FIELDS | {
    "plain": {},
    "one key head": {"num_kv_heads": 1},
    "no sharing": {"num_kv_heads": 4},
    "all, deeper, unrolled": {
        "qkv_bias": True,
        "qk_norm": True,
        "rotary_fraction": 0.5,
        "tied_embeddings": False,
        "num_layers": 3,
        "scan_layers": False,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_the_references(x64, changes):
    config = small_config(**changes)
    model = random_model(config)
    inputs = reference.packed([4, 3], TIME, config)
    got = main_logits(*model, *inputs)
    expected = reference.forward(*model[1:], config, *inputs).logits
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "rotary_fraction": 0.5}])
def test_float32_logits_are_the_references_to_rounding(changes):
    """float32 takes another attention kernel than float64."""
    config = small_config(dtype="float32", **changes)
    model = random_model(config)
    inputs = reference.packed([4, 3], TIME, config)
    expected = reference.forward(*model[1:], config, *inputs).logits
    assert norm_error(main_logits(*model, *inputs), expected) < 1e-5


@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS)
def test_each_field_changes_the_logits(x64, changes):
    config = small_config()
    inputs = rows(config, [5, 5], TIME)
    before = main_logits(*random_model(config), *inputs)
    after = main_logits(*random_model(dataclasses.replace(config, **changes)), *inputs)
    assert norm_error(after, before) > 1e-4


# -- layout -----------------------------------------------------------------------------------


@SIZES
def test_packed_sequences_have_the_logits_of_separate_rows(x64, moe):
    config = small_config(moe=moe)
    model = random_model(config)
    lengths = [4, 2, 3]
    tokens, positions, segment_ids = reference.packed(lengths, TIME, config)
    together = main_logits(*model, tokens, positions, segment_ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone, place, segments = rows(config, [length] * 2, TIME)
        alone[:, :length] = tokens[:, part]
        got = main_logits(*model, alone, place, segments)[:, :length]
        np.testing.assert_allclose(together[:, part], got, atol=1e-12)
        start += length


@pytest.mark.parametrize("side", ["left", "right"])
@SIZES
def test_padding_changes_nothing(x64, side, moe):
    """Neither how much, nor what stands in it."""
    config = small_config(moe=moe)
    model = random_model(config)
    length = 6
    tokens, positions, segment_ids = rows(config, [length, length], TIME, side)
    present = segment_ids > 0
    padded = main_logits(*model, tokens, positions, segment_ids)
    other = np.where(present, tokens, (tokens + 1) % config.vocab_size)
    got = main_logits(*model, other, positions, segment_ids)
    np.testing.assert_array_equal(got[present], padded[present])
    _, positions, segment_ids = rows(config, [length, length], length)
    short = main_logits(*model, tokens[present].reshape(2, length), positions, segment_ids)
    np.testing.assert_allclose(padded[present], short.reshape(2 * length, -1), atol=1e-12)


@SIZES
def test_a_token_changes_nothing_before_it(x64, moe):
    config = small_config(moe=moe)
    model = random_model(config)
    tokens, positions, segment_ids = rows(config, [TIME, TIME], TIME)
    before = main_logits(*model, tokens, positions, segment_ids)
    for j in range(TIME):
        changed = tokens.copy()
        changed[:, j] = (changed[:, j] + 1) % config.vocab_size
        after = main_logits(*model, changed, positions, segment_ids)
        np.testing.assert_array_equal(after[:, :j], before[:, :j])
        assert (np.abs(after[:, j:] - before[:, j:]).max(axis=-1) > 1e-6).all()


def test_only_relative_positions_matter(x64):
    config = small_config(rotary_fraction=0.5)
    model = random_model(config)
    tokens, positions, segment_ids = rows(config, [6, 6], TIME)
    here = main_logits(*model, tokens, positions, segment_ids)
    np.testing.assert_allclose(
        main_logits(*model, tokens, positions + 5, segment_ids), here, atol=1e-11
    )
    assert norm_error(main_logits(*model, tokens, positions * 2, segment_ids), here) > 1e-4


# -- memory and precision ---------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(graphdef, params, rest, inputs):
    """Value and both logits, and the gradient."""

    def loss(params):
        main, ahead = merge_model(graphdef, params, rest)(*inputs)
        return jnp.sum(main**2) / main.size + jnp.sum(jnp.sin(ahead)), (main, ahead)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.release
def test_loops_and_recomputation_leave_values_and_gradients():
    """On a model with a dense layer, two sparse ones, and a module."""
    config = small_config(1, dtype="float32", num_layers=3, moe=MOE)
    graphdef, params, rest = random_model(config)
    inputs = rows(config, [5, 6], 6)
    (value, _), gradient = value_and_gradient(graphdef, params, rest, inputs)
    for changes in ({"scan_layers": False, "remat": "full"}, {"remat": "dots"}):
        other = random_model(dataclasses.replace(config, **changes))[0]
        (got, _), other_gradient = value_and_gradient(other, params, rest, inputs)
        np.testing.assert_allclose(got, value, rtol=1e-5)
        for (path, a), e in zip(
            jax.tree_util.tree_leaves_with_path(other_gradient),
            jax.tree.leaves(gradient),
            strict=True,
        ):
            assert np.linalg.norm(e) > 0, path
            assert norm_error(a, e) < 1e-5, (changes, path)


def test_remat_and_scan_are_in_the_program_where_asked_for():
    """Equal values would not show that a setting is ignored."""

    def program(**changes):
        config = small_config(1, dtype="float32", **changes)
        graphdef, params, rest = random_model(config)
        inputs = rows(config, [4], 4)
        return str(jax.make_jaxpr(lambda p: value_and_gradient(graphdef, p, rest, inputs))(params))

    plain, full, dots = program(), program(remat="full"), program(remat="dots")
    assert "remat" not in plain and "remat" in full and "remat" in dots
    products = [text.count("dot_general") for text in (plain, dots, full)]
    assert products[0] < products[1] < products[2], products
    assert "unroll=1" in plain and "unroll=2" not in plain
    assert "unroll=2" in program(scan_layers=False)


@pytest.mark.standard_promotion  # jax.nn.dot_product_attention mixes dtypes
@SIZES
def test_bfloat16_gives_float32_logits_near_the_references(moe):
    config = small_config(1, dtype="float32", compute_dtype="bfloat16", moe=moe)
    model = random_model(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(model[1])} == {jnp.dtype("float32")}
    inputs = rows(config, [5, 3], 5, "left")
    (_, (main, ahead)), gradient = value_and_gradient(*model, inputs)
    assert main.dtype == ahead.dtype == jnp.float32
    assert np.isfinite(main).all() and np.isfinite(ahead).all()
    if moe is None:  # rounding may send a token to another expert
        expected = reference.forward(*model[1:], config, *inputs)
        assert norm_error(main, expected.logits) < 0.05
        assert norm_error(ahead, expected.mtp_logits) < 0.05
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_stored_parameters_have_the_dtype_asked_for():
    config = small_config(1, dtype="bfloat16", tied_embeddings=False, qkv_bias=True)
    _, params, _ = random_model(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


# -- pure pytrees -----------------------------------------------------------------------------


@SIZES
def test_split_and_merge_are_inverse(moe):
    config = small_config(2, dtype="float32", moe=moe, tied_embeddings=False)
    graphdef, params, rest = random_model(config)
    again, params_again, rest_again = split_model(merge_model(graphdef, params, rest))
    assert again == graphdef and hash(again) == hash(graphdef)
    for a, b in [(params, params_again), (rest, rest_again)]:
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert set(params["mtp"]) == {"0", "1"}
    assert bool(rest) == (moe is not None)


def test_merge_under_vmap():
    """Two models at once; jit and grad are everywhere in this file."""
    config = small_config(1, dtype="float32")
    models = [random_model(config, seed) for seed in (0, 1)]
    graphdef = models[0][0]
    inputs = [jnp.asarray(a) for a in rows(config, [5, 6], TIME)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params for _, params, _ in models])

    @jax.jit
    @jax.vmap
    def logits(params):
        return merge_model(graphdef, params, {})(*inputs)

    for number, (main, ahead) in enumerate(zip(*logits(both), strict=True)):
        expected = run(*models[number], *inputs)
        np.testing.assert_allclose(main, expected.logits, atol=1e-5)
        np.testing.assert_allclose(ahead, expected.mtp_logits, atol=1e-5)


def test_gradient_is_the_finite_difference(x64):
    """Central differences at step 1e-6 leave about 1e-9 of error in float64."""
    config = small_config(1)
    graphdef, params, rest = random_model(config)
    inputs = rows(config, [5], 5)
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, params)
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), params)

    def moved(step):
        stepped = jax.tree.map(lambda a, d: a + step * d, params, direction)
        return value_and_gradient(graphdef, stepped, rest, inputs)[0][0]

    _, gradient = value_and_gradient(graphdef, params, rest, inputs)
    parts = jax.tree.map(lambda g, d: np.sum(np.asarray(g) * d), gradient, direction)
    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), difference, rtol=1e-6)


@pytest.mark.parametrize("changes", [{"tied_embeddings": True}, {"tied_embeddings": False}])
def test_turned_kernels_say_the_same_and_are_what_few_rows_read(x64, changes):
    config = small_config(heads=1, qkv_bias=True, **changes)
    model, few = merge_model(*random_model(config)), jax.random.normal(KEY, (2, 3, config.width))
    linear = model.mtp[0].projection
    wide = jnp.concatenate([few, -few], axis=-1)
    expected = model.logits(few), model.mtp_logits(few, 0), linear(wide)
    assert all(
        isinstance(layer.attention.query.turned, jax.Array) for (layer,) in model.layers_apart()
    )
    after = model.logits(few), model.mtp_logits(few, 0), linear(wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), after, expected)
    head = model.embedding if config.tied_embeddings else model.output_head
    head.turned, linear.turned = 0 * head.turned, 2 * linear.turned
    assert not np.any(model.logits(few))
    np.testing.assert_allclose(linear(wide), 2 * expected[2], atol=1e-12)
    many = jnp.tile(few, (layers.FEW_ROWS, 1, 1))  # these read the kernels as they lie
    np.testing.assert_allclose(model.logits(many)[:2], expected[0], atol=1e-12)


def test_tied_head_has_no_matrix_of_its_own():
    """Its gradient reaches embeddings of tokens that are not in the input; an untied one's not."""
    inputs = (np.full((1, 3), 4, np.int32), np.arange(3, dtype=np.int32)[None])
    inputs = (*inputs, np.ones((1, 3), np.int32))
    for tied in (True, False):
        config = small_config(dtype="float32", tied_embeddings=tied)
        model = random_model(config)
        assert ("output_head" in model[1]) is not tied
        gradient = value_and_gradient(*model, inputs)[1]["embedding"]["embedding"]
        assert np.abs(gradient[4]).max() > 0
        assert (np.abs(np.delete(gradient, 4, axis=0)).max() > 0) == tied


# -- errors -----------------------------------------------------------------------------------


def test_too_long_an_input_raises():
    config = small_config(1, dtype="float32", max_length=5)
    model = merge_model(*random_model(config))
    inputs = [jnp.asarray(array) for array in rows(config, [6], 6)]
    with pytest.raises(ValueError, match="6 tokens exceed the context of max_length=5"):
        model.trunk(*inputs)
    with pytest.raises(ValueError, match="6 tokens exceed"):
        model.mtp_hidden(jnp.zeros((1, 6, config.width)), *inputs)
    with pytest.raises(ValueError, match="6 tokens exceed"):
        model.empty_cache(1, 6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 0}, "num_layers must be > 0, got 0"),
        ({"vocab_size": 0}, "vocab_size must be > 0"),
        ({"num_heads": 3}, r"num_heads \(3\) must be a multiple"),
        ({"rotary_fraction": 0.25}, "even number"),
        ({"rotary_fraction": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"rotary_fraction": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"param_dtype": "int8"}, "param_dtype must be one of"),
        ({"compute_dtype": "float8"}, "compute_dtype must be one of"),
        ({"moe": MoEConfig(4, 1, 8, first_dense_layers=2)}, "first_dense_layers must be below"),
        ({"moe": MoEConfig(4, 1, 8, first_dense_layers=-1)}, "first_dense_layers"),
        ({"heads": -1}, "num_modules must be >= 0"),
    ],
    ids=str,
)
def test_bad_configurations_raise(changes, match):
    with pytest.raises(ValueError, match=match):
        small_config(**changes)


@pytest.mark.parametrize(
    ("config", "field", "match"),
    [
        (small_config(), "remat", "remat must be one of .'none', 'full', 'dots'., got 'other'"),
        (MTPConfig(), "kind", "kind must be one of .'sequential', 'parallel'., got 'other'"),
        (MTPConfig(), "concatenation", "concatenation must be .* got 'other'"),
    ],
)
def test_unknown_choices_raise(config, field, match):
    """Past the constructor, where this session's type checker refuses what users may pass."""
    broken = copy.copy(config)
    object.__setattr__(broken, field, "other")
    with pytest.raises(ValueError, match=match):
        broken.__post_init__()


@pytest.mark.parametrize("chunk", [2, pytest.param(5, marks=pytest.mark.release)])
def test_attention_in_chunks_of_queries_is_the_same(x64, chunk):
    """Logits and gradients, with padding and packed rows, for lengths that chunks do not divide."""
    config = tiny.model_config(1, "float64", num_kv_heads=2)
    model = tiny.build_model(config)
    segment_ids = jnp.array([[0, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1, 0]])
    tokens = jnp.arange(14).reshape(2, 7) % 11

    def loss(params, config):
        graphdef, _, _ = split_model(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
        decoder = merge_model(graphdef, params, model[2])
        main, heads = decoder(tokens, positions_from_segments(segment_ids), segment_ids)
        return jnp.sum(jnp.sin(main)) + jnp.sum(jnp.sin(heads))

    chunked = dataclasses.replace(config, attention_chunk=chunk)
    got = jax.jit(jax.value_and_grad(loss), static_argnums=1)(model[1], chunked)
    expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(model[1], config)
    tiny.close(got, expected, 1e-12)


@pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="what is written for TPUs is interpreted on CPUs alone"
)
def test_splash_attention_is_the_compilers(unchecked):
    """Interpreted on a CPU, in float32: values, and gradients of queries, keys and values."""
    rng = np.random.default_rng(0)
    time = 9
    heads = [jnp.asarray(rng.normal(size=(2, time, n, 128)), jnp.float32) for n in (4, 2, 2)]
    segment_ids = jnp.array([[0, 0, 1, 1, 1, 1, 2, 2, 2], [1] * 8 + [0]])
    context = Context(positions_from_segments(segment_ids), segment_ids)
    weight = jnp.asarray(rng.normal(size=(2, time, 4, 128)), jnp.float32)

    def loss(heads, kernel):
        mixed = attend(*heads, context, kernel=kernel)
        return jnp.sum(jnp.where((segment_ids > 0)[:, :, None, None], mixed * weight, 0))

    got = jax.jit(jax.value_and_grad(loss), static_argnums=1)(heads, "splash")
    expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(heads, "xla")
    tiny.close(got, expected, 1e-5)
    other = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
        [heads[0] * 1.01, *heads[1:]], "xla"
    )
    with pytest.raises(AssertionError):
        tiny.close(other, expected, 1e-5)
