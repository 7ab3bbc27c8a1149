"""Published checkpoints in and out: the same bits, and the same logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from occ.models import pretrained
from occ.models.policy import abstract_policy
from occ.models.pretrained import names, reading
from occ.models.pretrained.folder import WeightFolder
from occ.training.config import LayoutConfig
from occ.training.sharding import make_mesh, parameter_spec, tree_shardings
from occ.trees import path_string
from tests import published
from tests.published import CASES, GLM, LAYER, MIMO, write_folder
from tests.published_checks import TOLERANCE, configured, errors, stored

every_case = pytest.mark.parametrize("name", CASES)


# -- in -------------------------------------------------------------------------------------------


@every_case
def test_logits_are_those_of_others(tmp_path, name):
    """Of transformers, and for MTP modules of `reference_torch`; see make_published_logits."""
    model = pretrained.load(write_folder(tmp_path / "model", name))
    assert max(errors(model, name)) < TOLERANCE


def swapped(one, other):
    def fault(tensors):
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return fault


def transposed(name):
    def fault(tensors):
        assert tensors[name].shape[0] == tensors[name].shape[1]
        tensors[name] = tensors[name].T.copy()

    return fault


def halves_exchanged(name):
    def fault(tensors):
        tensors[name] = np.roll(tensors[name], tensors[name].shape[1] // 2, axis=1)

    return fault


EXPERTS = f"{LAYER}mlp.experts."
FAULTS = [
    ("llama", swapped(f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight")),
    ("llama", swapped(f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight")),
    ("llama", swapped("model.embed_tokens.weight", "lm_head.weight")),
    ("llama", swapped(f"{LAYER}input_layernorm.weight", "model.layers.0.input_layernorm.weight")),
    ("llama", transposed(f"{LAYER}self_attn.q_proj.weight")),
    ("llama", transposed(f"{LAYER}self_attn.o_proj.weight")),
    ("qwen3", swapped(f"{LAYER}self_attn.q_norm.weight", f"{LAYER}self_attn.k_norm.weight")),
    ("mimo", swapped(f"{LAYER}self_attn.k_proj.bias", f"{LAYER}self_attn.v_proj.bias")),
    ("mimo", swapped(f"{MIMO}token_layernorm.weight", f"{MIMO}hidden_layernorm.weight")),
    ("mimo", swapped(f"{MIMO}final_layernorm.weight", "model.norm.weight")),
    ("mimo", halves_exchanged(f"{MIMO}input_proj.weight")),
    ("glm", swapped(f"{GLM}enorm.weight", f"{GLM}hnorm.weight")),
    ("glm", halves_exchanged(f"{GLM}eh_proj.weight")),
    ("glm", swapped(f"{EXPERTS}0.up_proj.weight", f"{EXPERTS}3.up_proj.weight")),
    ("glm", swapped(f"{LAYER}mlp.gate.weight", f"{GLM}mlp.gate.weight")),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=range(len(FAULTS)))
def test_a_planted_fault_changes_the_logits(tmp_path, name, fault):
    """Shapes do not tell these: only the numbers do."""
    tensors = published.tensors(CASES[name])
    fault(tensors)
    model = pretrained.load(published.write(tmp_path / "model", CASES[name], tensors))
    assert max(errors(model, name)) > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ["mimo", "glm"])
@pytest.mark.parametrize(
    "fields",
    [
        {"concatenation": "hidden_embedding"},
        {"concatenation": "embedding_hidden"},
        {"hidden_after_final_norm": False},
        {"zero_first_embedding": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_module_joined_otherwise_has_other_logits(tmp_path, name, fields):
    model = pretrained.load(write_folder(tmp_path / "model", name))
    changed = configured(model, **fields)
    main, module = errors(changed, name)
    assert main < TOLERANCE
    assert (module > 1000 * TOLERANCE) == (changed.config != model.config)


@pytest.mark.parametrize("name", ["mimo", "glm"])
def test_on_a_mesh_each_device_reads_its_own_part(tmp_path, name, monkeypatch):
    folder = write_folder(tmp_path / "model", name)
    config = pretrained.read_config(folder)
    whole = pretrained.load(folder)
    layout = LayoutConfig(fsdp=2, tensor=1, data=2)
    mesh = make_mesh(layout)
    trees = abstract_policy(config)
    trees = trees.params, trees.rest
    shardings = tuple(tree_shardings(tree, mesh) for tree in trees)
    sizes, read = [], WeightFolder.read

    def counted(self, name, window=()):
        part = read(self, name, window)
        if "gate_proj" in name:
            sizes.append(part.size / np.prod(self.tensors[name].shape))
        return part

    monkeypatch.setattr(WeightFolder, "read", counted)
    model = pretrained.load(folder, config, shardings=shardings)
    assert sizes and max(sizes) == 1 / 2
    for one, other, place in zip(
        *(jax.tree.leaves(x) for x in ((model.params, model.rest), (whole.params, whole.rest))),
        jax.tree.leaves(shardings),
        strict=True,
    ):
        assert one.sharding == place
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("piece_bytes", [reading.PIECE_BYTES, 0], ids=["leaf", "layer"])
@pytest.mark.parametrize("layout", [None, LayoutConfig(fsdp=2)], ids=["one device", "fsdp"])
def test_host_memory_holds_a_part_of_a_leaf_or_of_one_layer(
    tmp_path, monkeypatch, piece_bytes, layout
):
    """Every buffer that is filled; large leaves arrive layer by layer, to the same bits."""
    folder = write_folder(tmp_path / "model", "glm with options")
    config = pretrained.read_config(folder)
    whole = pretrained.load(folder)
    shardings = None
    if layout is not None:
        mesh = make_mesh(layout)
        trees = abstract_policy(config)
        trees = trees.params, trees.rest
        shardings = tuple(tree_shardings(tree, mesh) for tree in trees)
    filled, window = [], reading._window
    monkeypatch.setattr(
        reading, "_window", lambda *args: filled.append(window(*args)) or filled[-1]
    )
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    model = pretrained.load(folder, config, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, model.params, whole.params)
    leaves = names.stored_leaves(config)
    largest = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path((model.params, model.rest)):
        stacked = leaves[path_string(path[1:])].leading > 0 and piece_bytes == 0
        part = leaf.addressable_shards[0].data.nbytes
        largest = max(largest, part // leaf.shape[0] if stacked else part)
    assert max(buffer.nbytes for buffer in filled) == largest


def test_overrides_decide_the_dtype_in_memory(tmp_path):
    folder = write_folder(tmp_path / "model", "llama", "bfloat16")
    config = pretrained.read_config(folder, param_dtype="float32", remat="full")
    assert (config.param_dtype, config.compute_dtype, config.remat) == (
        "float32",
        "bfloat16",
        "full",
    )
    model = pretrained.load(folder, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.float32.dtype}
    pretrained.save(tmp_path / "saved", model, config=config, like=folder)
    assert stored(tmp_path / "saved") == stored(folder)


def test_mixed_dtypes_are_kept_where_the_model_is_wide_enough(tmp_path):
    """transformers saves the router in float32 in a bfloat16 model."""
    wide = ("e_score_correction_bias", "mlp.gate.weight")
    tensors = published.tensors(CASES["glm"])
    folder = published.write(tmp_path / "model", CASES["glm"], tensors, "bfloat16", wide)
    with pytest.warns(pretrained.PretrainedWarning, match=r"2 tensors .* float32 holds all"):
        pretrained.load(folder)
    model = pretrained.load(folder, pretrained.read_config(folder, param_dtype="float32"))
    pretrained.save(tmp_path / "saved", model, like=folder)
    assert len({dtype for _, dtype, _ in stored(folder).values()}) == 2
    assert stored(tmp_path / "saved") == stored(folder)


def test_rounding_on_the_way_in_is_said(tmp_path):
    folder = write_folder(tmp_path / "model", "llama")
    config = pretrained.read_config(folder, param_dtype="bfloat16")
    with pytest.warns(pretrained.PretrainedWarning, match="21 tensors of .* are rounded"):
        pretrained.load(folder, config)


# -- out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_case
def test_a_round_trip_is_the_same_bits(tmp_path, name, dtype):
    folder = write_folder(tmp_path / "model", name, dtype)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("not read")
    model = pretrained.load(folder)
    pretrained.save(tmp_path / "like", model, like=folder)
    pretrained.save(tmp_path / "fresh", model)
    expected = stored(folder)
    assert len(expected) > 15
    assert stored(tmp_path / "like") == expected
    assert stored(tmp_path / "fresh") == expected
    read = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "like")]
    assert read[0] == read[1]
    assert pretrained.read_config(tmp_path / "fresh") == model.config
    files = sorted(file.name for file in (tmp_path / "like").iterdir())
    assert files == ["config.json", "model.safetensors", "occ_digests.json", "tokenizer.json"]


@pytest.mark.parametrize("name", ["mimo", "glm"])
def test_files_of_bounded_size_with_an_index(tmp_path, name):
    folder = write_folder(tmp_path / "model", name)
    model = pretrained.load(folder)
    most = 6000
    pretrained.save(tmp_path / "out", model, shard_bytes=most)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    sizes = [sum(value.nbytes for value in load_file(file).values()) for file in files]
    assert max(sizes) <= most
    assert index["metadata"]["total_size"] == sum(sizes)
    assert stored(tmp_path / "out") == stored(folder)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    folder = write_folder(tmp_path / "model", "llama")
    model = pretrained.load(folder)
    with pytest.raises(ValueError, match="exists already"):
        pretrained.save(folder, model)


def test_another_architecture_than_that_of_like_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model", "llama")
    other = pretrained.load(write_folder(tmp_path / "other", "qwen3"))
    with pytest.raises(ValueError, match="head_dim, qk_norm"):
        pretrained.save(tmp_path / "out", other, like=folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rotary_fraction": 0.5}, "rotary_fraction"), ({"qkv_bias": True, "qk_norm": True}, "both")],
)
def test_what_no_family_has_is_not_saved(tmp_path, changes, words):
    model = pretrained.load(write_folder(tmp_path / "model", "llama"))
    config = dataclasses.replace(model.config, **changes)
    with pytest.raises(ValueError, match=words):
        pretrained.save(tmp_path / "out", model, config=config)


# -- copies ---------------------------------------------------------------------------------------


OWN = {"embed_tokens.weight": "own_embedding", "shared_head.head.weight": "own_output_head"}


@pytest.mark.parametrize("different", [[], *[[name] for name in OWN], list(OWN)])
def test_a_modules_embedding_and_head_are_shared_where_they_are_copies(tmp_path, different):
    """To the last bit; else they are kept apart, and written back either way."""
    tensors = published.tensors(CASES["glm"])
    for name in different:
        tensors[f"{GLM}{name}"][1, 2] = np.nextafter(tensors[f"{GLM}{name}"][1, 2], np.float32(9))
    folder = published.write(tmp_path / "model", CASES["glm"], tensors)
    model = pretrained.load(folder)
    for name, field in OWN.items():
        assert getattr(model.config.mtp, field) == (name in different)
    assert ("embedding" in model.params["mtp"]["0"]) == ("embed_tokens.weight" in different)
    assert max(errors(model, "glm")) < TOLERANCE  # a last bit is no other model
    for like in (folder, None):
        target = tmp_path / f"saved-{like is None}"
        pretrained.save(target, model, like=like)
        assert stored(target) == stored(folder)
    shared = configured(model, own_embedding=False, own_output_head=False).config
    if different:
        with pytest.raises(ValueError, match=rf"{different[0]}: differs .*MTPConfig.own"):
            pretrained.load(folder, shared)


def test_a_modules_own_embedding_and_head_are_what_it_reads_and_says(tmp_path):
    """Other ones change the module's logits, and not the main head's."""
    tensors = published.tensors(CASES["glm"])
    rng = np.random.default_rng(0)
    for name in OWN:
        tensors[f"{GLM}{name}"] += rng.normal(size=(13, 16)).astype(np.float32)
    model = pretrained.load(published.write(tmp_path / "model", CASES["glm"], tensors))
    main, module = errors(model, "glm")
    assert main < TOLERANCE < 0.1 < module


def test_a_modules_own_leaves_lie_where_the_trunks_do():
    for path in ("embedding/embedding", "output_head/kernel"):
        assert parameter_spec(f"mtp/0/{path}", (13, 16)) == parameter_spec(path, (13, 16))


def test_modules_without_copies_are_written_without(tmp_path):
    tensors = published.tensors(CASES["glm"])
    for name in OWN:
        del tensors[f"{GLM}{name}"]
    folder = published.write(tmp_path / "model", CASES["glm"], tensors)
    model = pretrained.load(folder)
    assert max(errors(model, "glm")) < TOLERANCE
    pretrained.save(tmp_path / "saved", model, like=folder)
    assert stored(tmp_path / "saved") == stored(folder)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_output_head_that_is_stored_as_well(tmp_path, equal):
    raw = CASES["qwen3 tied"]
    tensors = published.tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(not equal)
    folder = published.write(tmp_path / "model", raw, tensors)
    if not equal:
        with pytest.raises(ValueError, match="lm_head.weight: differs .*tied_embeddings=False"):
            pretrained.load(folder)
        return
    model = pretrained.load(folder)
    assert "output_head" not in model.params
    pretrained.save(tmp_path / "saved", model, like=folder)
    assert stored(tmp_path / "saved") == stored(folder)
