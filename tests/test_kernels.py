"""Kernels of accelerators against what the compiler makes: interpreted, or where there is one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ.generation.decoding import generate
from occ.generation.sampling import SamplingConfig
from occ.models import cache_kernels
from occ.models.attention import Context, attend, prefill_kernel
from occ.models.cache import Past, StackCache, attend_to_past, columns_in_blocks, decode_kernel
from occ.models.decoder import Decoder
from occ.models.partitioning import AXES
from occ.models.policy import Policy
from occ.training.batch import positions_from_segments
from tests import tiny
from tests.reference_models import random_model, rows, small_config

ON_GPU = jax.default_backend() == "gpu"
LAYERS, KV_HEADS, GROUP, HEAD_DIM = 3, 2, 3, 32


def past(lengths, first, dtype, columns=512):
    rng = np.random.default_rng(0)
    shape = (LAYERS, len(lengths), KV_HEADS, columns, HEAD_DIM)
    stack = StackCache(*(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2)))
    return Past(stack, jnp.int32(1), jnp.asarray(lengths, jnp.int32), first)


def further(batch, time, dtype):
    rng = np.random.default_rng(1)
    shapes = [(batch, time, KV_HEADS * GROUP, HEAD_DIM)]
    shapes += [(batch, KV_HEADS, time, HEAD_DIM)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def read_all(heads, seen, kernel):
    # `first` is static.
    return jax.jit(lambda *heads: attend_to_past(*heads, seen, kernel))(*heads)


def for_tpus(*inputs, first, interpret=False):
    return cache_kernels.on_tpu(*inputs, first=first, interpret=interpret)


@pytest.mark.parametrize("device", ["gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("first", "time"), [(0, 1), (2, 3)])
def test_a_kernel_reads_what_the_compilers_does(unchecked, monkeypatch, first, time, dtype, device):
    """Rows with nothing, one token, one block and more behind them."""
    if device == "tpu":
        if ON_GPU:
            pytest.skip("what is written for TPUs is interpreted on CPUs alone")
        monkeypatch.setattr(cache_kernels, "on_gpu", for_tpus)
    lengths = [0, 1, 128, 300]
    heads, seen = further(4, time, dtype), past(lengths, first, dtype)
    expected = read_all([h.astype("float32") for h in heads], _wide(seen), "xla")
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    got = read_all(heads, seen, "pallas").astype("float32")
    np.testing.assert_allclose(got, expected, atol=tolerance)
    shorter = seen._replace(lengths=jnp.maximum(seen.lengths - 1, 0))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            read_all(heads, shorter, "pallas").astype("float32"), expected, atol=tolerance
        )


def _wide(seen):
    return seen._replace(stack=StackCache(*(x.astype("float32") for x in seen.stack)))


def test_few_rows_share_their_columns_between_programs(unchecked, monkeypatch):
    heads, seen = further(2, 1, "float32"), past([300, 512], 0, "float32")
    expected = read_all(heads, seen, "xla")
    for programs in (1, 12):  # three programs a pair of row and head, or one
        monkeypatch.setattr("occ.models.cache_kernels.PROGRAMS", programs)
        np.testing.assert_allclose(read_all(heads, seen, "pallas"), expected, atol=1e-5)


def test_a_cache_written_at_once_is_that_written_row_by_row(monkeypatch):
    """As GPUs do it: some layers, each row from its own column on."""
    rng = np.random.default_rng(0)
    old, new = (
        StackCache(*(jnp.asarray(rng.normal(size=(n, 3, 2, s, 4)), "float32") for _ in range(2)))
        for n, s in ((4, 9), (2, 3))
    )
    columns = jnp.array([0, 6, 2], jnp.int32)
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        written = old.write(new, columns, 1)
        for before, after, values in zip(old, written, new, strict=True):
            expected = np.array(before)
            for row, column in enumerate([0, 6, 2]):
                expected[1:3, row, :, column : column + 3] = values[:, row]
            np.testing.assert_array_equal(after, expected)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 2])
def test_generation_with_the_kernel_says_the_same(unchecked, depth):
    config = small_config(2, "float32", head_dim=16)
    policy = Policy(config, *random_model(config)[1:])
    tokens, _, segment_ids = rows(config, (2, 5, 3), 5, "left", 0)
    sampling = SamplingConfig(6)

    def run(kernel):
        changed = dataclasses.replace(config, decode_attention=kernel)
        return jax.jit(generate, static_argnames=("config", "draft_depth"))(
            policy.replace(config=changed),
            jnp.asarray(tokens),
            jnp.asarray(segment_ids == 1),
            jax.random.key(3),
            config=sampling,
            draft_depth=depth,
        )

    plain, kernel = run("xla"), run("pallas")
    np.testing.assert_array_equal(kernel.tokens, plain.tokens)
    np.testing.assert_allclose(kernel.log_prob, plain.log_prob, atol=1e-5)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("there", ["cpu", "gpu", "tpu"])
def test_what_is_compiled_for_other_devices_suits_those(there, monkeypatch):
    """As plans for pods are, on a machine with a CPU alone: by the mesh, and not by the machine."""
    config = small_config(1, "bfloat16", head_dim=64)
    device = jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform=there)
    mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, abstract_device=device)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    policy = Policy(config, *random_model(config)[1:])
    tokens, _, segment_ids = rows(config, (2, 3), 3, "left", 0)
    took_apart, take_apart = [], Decoder.layers_apart

    def noted(model):
        took_apart.append(model)
        return take_apart(model)

    monkeypatch.setattr(Decoder, "layers_apart", noted)
    with jax.sharding.use_abstract_mesh(mesh):
        assert decode_kernel(config) == {"gpu": "pallas"}.get(there, "xla")
        assert prefill_kernel(config) == {"gpu": "cudnn"}.get(there, "xla")
        plain = dataclasses.replace(config, attention="xla", decode_attention="xla")
        jax.eval_shape(
            functools.partial(generate, config=SamplingConfig(2)),
            policy.replace(config=plain),
            jnp.asarray(tokens),
            jnp.asarray(segment_ids == 1),
            jax.random.key(0),
        )
    assert bool(took_apart) == (there == "cpu")


def test_each_device_takes_the_kernel_that_suits_it(monkeypatch):
    config = small_config(head_dim=64, compute_dtype="bfloat16")
    wide = dataclasses.replace(config, compute_dtype="float64")
    uneven = dataclasses.replace(config, head_dim=24)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert (prefill_kernel(config), decode_kernel(config)) == ("xla", "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (prefill_kernel(config), decode_kernel(config)) == ("cudnn", "pallas")
    assert (prefill_kernel(wide), decode_kernel(wide)) == ("xla", "xla")
    assert (prefill_kernel(uneven), decode_kernel(uneven)) == ("cudnn", "xla")
    chosen = dataclasses.replace(config, attention="xla", decode_attention="xla")
    assert (prefill_kernel(chosen), decode_kernel(chosen)) == ("xla", "xla")
    assert columns_in_blocks(1, "pallas") == cache_kernels.COLUMNS


def test_several_cotangents_go_back_through_cudnn_one_by_one(x64, monkeypatch):
    """With the compiler's attention in its place: the way there and back is ours."""
    monkeypatch.setattr("occ.models.attention.CUDNN", "xla")
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=(2, 5, n, 8)), "float32") for n in (4, 2, 2)]
    segment_ids = jnp.array([[0, 1, 1, 2, 2], [1] * 5])
    context = Context(positions_from_segments(segment_ids), segment_ids)
    cotangents = jnp.asarray(rng.normal(size=(3, 2, 5, 4, 8)), "float32")

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(kernel):
        mixed, pull = jax.vjp(lambda *heads: attend(*heads, context, kernel=kernel), *heads)
        return mixed, jax.vmap(pull)(cotangents)

    tiny.close(gradients("cudnn"), gradients("xla"), 1e-5)


@pytest.mark.skipif(not ON_GPU, reason="cuDNN runs on NVIDIA's GPUs alone")
@pytest.mark.standard_promotion
def test_cudnn_attention_is_the_compilers(unchecked):
    """In bfloat16: gradients, with an odd number of tokens, padding two sequences."""
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=(2, 9, n, 64)), "bfloat16") for n in (4, 2, 2)]
    segment_ids = jnp.array([[0, 0, 1, 1, 1, 1, 2, 2, 2], [1] * 8 + [0]])
    context = Context(positions_from_segments(segment_ids), segment_ids)
    weight = jnp.asarray(rng.normal(size=(2, 9, 4, 64)), "float32")
    weight = jnp.where((segment_ids > 0)[:, :, None, None], weight, 0)  # padding says nothing

    def loss(heads, kernel):
        return jnp.sum(attend(*heads, context, kernel=kernel) * weight)

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    wide = [head.astype("float32") for head in heads]
    expected = both(wide, "xla")[1]
    got = [x.astype("float32") for x in both(heads, "cudnn")[1]]
    tiny.close(got, list(expected), 5e-2)
    _, pull = jax.vjp(lambda *heads: attend(*heads, context, kernel="cudnn"), *heads)
    two = jax.vmap(pull)(jnp.stack([weight, 2 * weight]).astype("bfloat16"))
    tiny.close([x[1].astype("float32") for x in two], [2 * x for x in expected], 1e-1)
