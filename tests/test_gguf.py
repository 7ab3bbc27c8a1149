"""Models out of GGUF files that the tests write, as llama.cpp's converter does."""

import dataclasses
import struct

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ.models import gguf
from occ.models.decoder import merge_model
from tests import tiny

CONFIG = tiny.model_config(
    0, vocab_size=32, width=32, num_heads=4, num_kv_heads=2, mlp_width=64, rope_base=500.0
)


def neighbouring(rows, heads):
    """Rows of heads in two halves, as the converter writes them: pairs side by side."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensors_of(params, config):
    """A file's tensors, by name, of our parameters."""
    layers = jax.tree.map(np.asarray, params["layers"])
    attention, mlp = layers["attention"], layers["mlp"]
    tensors = {
        "token_embd.weight": params["embedding"]["embedding"],
        "output_norm.weight": params["final_norm"]["scale"],
    }
    if not config.tied_embeddings:
        tensors["output.weight"] = params["output_head"]["kernel"].T
    for i in range(config.num_layers):
        query, key = (attention[name]["kernel"][i].T for name in ("query", "key"))
        tensors |= {
            f"blk.{i}.attn_norm.weight": layers["attention_norm"]["scale"][i],
            f"blk.{i}.attn_q.weight": neighbouring(query, config.num_heads),
            f"blk.{i}.attn_k.weight": neighbouring(key, config.num_kv_heads),
            f"blk.{i}.attn_v.weight": attention["value"]["kernel"][i].T,
            f"blk.{i}.attn_output.weight": attention["output"]["kernel"][i].T,
            f"blk.{i}.ffn_norm.weight": layers["mlp_norm"]["scale"][i],
            f"blk.{i}.ffn_gate.weight": mlp["gate"]["kernel"][i].T,
            f"blk.{i}.ffn_up.weight": mlp["up"]["kernel"][i].T,
            f"blk.{i}.ffn_down.weight": mlp["down"]["kernel"][i].T,
        }
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def write(path, tensors, config=CONFIG, architecture="llama", quantised=None, **more):
    """A GGUF file; `more` calls further methods of the writer."""
    writer = package.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    for method, value in more.items():
        getattr(writer, method)(value)
    for name, value in tensors.items():
        if quantised is not None and value.ndim == 2:
            packed = package.quants.quantize(value, quantised)
            writer.add_tensor(name, packed, raw_dtype=quantised)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(config, rest, params):
    graphdef, *_ = tiny.build_model(config)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
    return merge_model(graphdef, params, rest)(tokens, positions, jnp.ones_like(tokens))[0]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request, tmp_path_factory):
    config = dataclasses.replace(CONFIG, tied_embeddings=request.param)
    _, params, rest = tiny.build_model(config)
    noise = np.random.default_rng(0)
    params = jax.tree.map(  # norms are ones at first, and would be alike
        lambda x: x + noise.normal(size=x.shape).astype(np.float32) * 0.1, params
    )
    tensors = tensors_of(params, config)
    path = write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors, config)
    return config, params, rest, tensors, path


def test_a_model_comes_back_as_it_was(case):
    config, params, rest, _, path = case
    loaded = gguf.load(path)
    assert loaded.config == gguf.read_config(path) == config
    assert loaded.rest == rest == {}
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    tiny.close(loaded.params, params, 0.0)
    tiny.close(logits(config, rest, loaded.params), logits(config, rest, params), 1e-6)


@pytest.mark.parametrize("fault", ["query", "key"])
def test_heads_in_the_order_of_the_file_are_another_model(case, fault):
    """Without the permutation, or with that of another number of heads, logits differ."""
    config, params, rest, tensors, path = case
    short = {"query": "q", "key": "k"}[fault]
    heads = {"query": config.num_heads, "key": config.num_kv_heads}[fault]
    wrong = gguf.load(path).params
    rows = [tensors[f"blk.{i}.attn_{short}.weight"] for i in range(config.num_layers)]
    wrong["layers"]["attention"][fault]["kernel"] = jnp.stack([each.T for each in rows])
    right = logits(config, rest, params)
    assert np.linalg.norm(logits(config, rest, wrong) - right) > 0.01 * np.linalg.norm(right)
    halves = [gguf.half_split(each, config.head_dim, config.rotary_dim) for each in rows]
    for each, row in zip(halves, rows, strict=True):
        assert np.array_equal(neighbouring(each, heads), row)


def test_dimensions_that_do_not_turn_stay():
    rows = np.arange(16)[:, None] * np.ones((1, 3))
    split = gguf.half_split(rows, head_dim=8, rotary_dim=4)
    assert split[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_weights_are_dequantised(case, tmp_path, name):
    config, params, _, tensors, _ = case
    kind = package.GGMLQuantizationType[name]
    path = write(tmp_path / "q.gguf", tensors, config, quantised=kind)
    loaded = gguf.load(path).params
    tiny.close(loaded, params, 0.1)
    exact = package.quants.dequantize(
        package.quants.quantize(tensors["token_embd.weight"], kind), kind
    )
    assert np.array_equal(loaded["embedding"]["embedding"], exact)


def test_the_reader_chooses_what_the_file_leaves_open(case):
    config, params, _, _, path = case
    chosen = dataclasses.replace(
        config, param_dtype="bfloat16", max_length=16, remat="full", mtp=tiny.model_config(2).mtp
    )
    loaded = gguf.load(path, chosen)
    assert loaded.config.max_length == 16 and loaded.config.mtp.num_modules == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    tiny.close(loaded.params, params, 0.01)


def test_weights_go_where_they_belong(case):
    config, params, _, _, path = case
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        spec = jax.P(*(None,) * (leaf.ndim - 1), "a")
        return jax.sharding.NamedSharding(mesh, spec)

    shardings = jax.tree.map(place, params), {}
    loaded = gguf.load(path, config, shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded.params) == shardings[0]
    tiny.close(loaded.params, params, 0.0)


def test_a_configuration_of_another_model_is_refused(case):
    config, _, _, _, path = case
    other = dataclasses.replace(config, num_layers=3, rope_base=1e4, max_length=33)
    with pytest.raises(ValueError) as caught:
        gguf.load(path, other)
    for line in (
        "num_layers: 3 in the configuration, 2 in the files",
        "rope_base: 10000.0 in the configuration, 500.0 in the files",
        "max_length: 33 exceeds the 32 of the files",
    ):
        assert line in str(caught.value)
    assert "width" not in str(caught.value)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t, {"architecture": "qwen2"}, "architecture 'qwen2'; only 'llama'"),
        (lambda t: t, {"add_expert_count": 8}, "mixture of 8 experts"),
        (
            lambda t: t,
            {"add_rope_scaling_type": package.RopeScalingType.YARN},
            "scales its rotary frequencies .'yarn'",
        ),
        (lambda t: t | {"rope_freqs.weight": np.ones(4, np.float32)}, {}, "rotary frequencies"),
        (lambda t: t, {"add_head_count_kv": [2, 1]}, "head_count_kv varies by layer"),
        (
            lambda t: without(t, "blk.1.attn_k.weight"),
            {},
            r"lacks \['blk.1.attn_k.weight'\] \(1\)",
        ),
        (
            lambda t: t | {"blk.0.attn_q.bias": np.ones(32, np.float32)},
            {},
            r"has \['blk.0.attn_q.bias'\]",
        ),
        (
            lambda t: t | {"blk.1.ffn_up.weight": np.ones((64, 31), np.float32)},
            {},
            r"'blk.1.ffn_up.weight' has shape \(64, 31\), expected \(64, 32\)",
        ),
    ],
)
def test_files_that_are_not_understood_are_refused(case, tmp_path, change, options, message):
    config, _, _, tensors, _ = case
    path = write(tmp_path / "x.gguf", change(tensors), config, **options)
    with pytest.raises(ValueError, match=message):
        gguf.load(path)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("I", 1_000_000, "x.gguf: gguf: the file counts 1000000 layers and holds 2. tensors"),
        ("I", 0, "llama.block_count must be a number > 0, got 0"),
        ("f", 2.5, "ModelConfig.num_layers must be int, got 2.5"),
    ],
)
def test_counts_that_no_file_has_are_refused_at_once(
    unchecked, case, tmp_path, kind, value, message
):
    path = spoiled(case, tmp_path, "llama.block_count", kind, value)
    with pytest.raises(ValueError, match=message):
        gguf.load(path)


def spoiled(case, tmp_path, field, kind, value):
    """The file with another value (4 bytes, of another kind) in one field."""
    whole = bytearray(case[-1].read_bytes())
    place = whole.index(field.encode()) + len(field)
    numbers = {"I": package.GGUFValueType.UINT32, "f": package.GGUFValueType.FLOAT32}
    whole[place : place + 8] = struct.pack(f"<I{kind}", numbers[kind], value)
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    return path


def test_a_file_that_announces_more_than_it_holds_is_refused(case, tmp_path):
    """The library's reader would walk on through it."""
    path, whole = tmp_path / "x.gguf", case[-1].read_bytes()
    array = struct.pack("<Q3sIIQ", 3, b"a.b", package.GGUFValueType.ARRAY, 4, 2**40)
    strings = struct.pack("<Q3sIIQ", 3, b"a.b", package.GGUFValueType.ARRAY, 8, 2**40)
    for bad in (
        b"",
        b"GGUF",
        b"GGML" + whole[4:],
        whole[:4] + struct.pack("<I", 9) + whole[8:],
        whole[:8] + struct.pack("<QQ", 0, 2**60) + whole[24:],
        whole[:8] + struct.pack("<QQ", 2**60, 0) + whole[24:],
        whole[:8] + struct.pack("<QQ", 0, 1) + array,
        whole[:8] + struct.pack("<QQ", 0, 1) + strings + bytes(100),
        whole[:8] + struct.pack("<QQQ", 0, 1, 2**62),
        whole[:-64],
        whole[: len(whole) // 2],
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="x.gguf is no whole GGUF file"):
            gguf.load(path)
