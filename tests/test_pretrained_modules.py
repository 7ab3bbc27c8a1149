"""Published checkpoints that are refused, and models whose MTP modules are not there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.configs import paper
from occ.models import pretrained
from occ.models.policy import abstract_policy
from occ.models.pretrained import architectures, names
from tests import published
from tests.published import CASES, GLM, LAYER, MIMO, write_folder
from tests.published_checks import EXPECTED, TOLERANCE, configured, error, errors, logits

# -- refusals -------------------------------------------------------------------------------------


def test_missing_left_over_and_misshapen_tensors_are_listed_together(tmp_path):
    tensors = published.tensors(CASES["glm"])
    del tensors["model.norm.weight"], tensors[f"{GLM}mlp.experts.4.up_proj.weight"]
    tensors["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
    tensors[f"{LAYER}self_attn.k_proj.weight"] = np.zeros((3, 16), np.float32)
    folder = published.write(tmp_path / "model", CASES["glm"], tensors)
    with pytest.raises(ValueError) as raised:
        pretrained.load(folder)
    lines = str(raised.value).splitlines()
    assert lines[1:-1] == [
        "missing:",
        f"  {GLM}mlp.experts.4.up_proj.weight",
        "  model.norm.weight",
        "left over:",
        "  model.layers.0.self_attn.sinks",
        "of another shape:",
        f"  {LAYER}self_attn.k_proj.weight: expected (16, 16), got (3, 16)",
    ]


def test_buffers_of_old_files_are_no_weights(tmp_path):
    tensors = published.tensors(CASES["llama"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    model = pretrained.load(published.write(tmp_path / "model", CASES["llama"], tensors))
    assert max(errors(model, "llama")) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "model_type", "deepseek_v3"),
        ("llama", "hidden_act", "gelu"),
        ("llama", "mlp_bias", True),
        ("llama", "attention_bias", True),
        ("qwen3", "attention_bias", True),
        ("qwen2", "use_sliding_window", True),
        ("qwen3", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "quantization_config", {"quant_method": "fp8"}),
        ("qwen2", "use_mrope", True),
        ("glm", "scoring_func", "softmax"),
        ("llama", "torch_dtype", "float8_e4m3fn"),
        ("llama", "num_hidden_layers", None),
        ("glm", "n_routed_experts", None),
        ("llama", "model_type", ["llama"]),
        ("llama", "hidden_size", "16"),
        ("llama", "num_attention_heads", 2.0),
        ("llama", "num_attention_heads", 0),
        ("llama", "rms_norm_eps", [1e-5]),
        ("llama", "rope_theta", "10000"),
        ("llama", "rope_scaling", "linear"),
        ("llama", "tie_word_embeddings", "yes"),
        ("glm", "norm_topk_prob", 1),
        ("llama", "occ", {"mtp": {"layers": 2}}),
        ("llama", "occ", 3),
    ],
)
def test_an_unsupported_field_is_named(unchecked, tmp_path, name, field, value):
    """With the file."""
    folder = write_folder(tmp_path / "model", name)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {field: value}))
    ours = {"num_attention_heads": "num_attention_heads|num_heads", "norm_topk_prob": "normalise_"}
    ours["tie_word_embeddings"] = "tied_embeddings"
    with pytest.raises(ValueError, match=rf"(?s)model/config.json: .*({ours.get(field, field)})"):
        pretrained.read_config(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_hidden_layers": 1_000_000}),
        ("glm", {"n_routed_experts": 1_000_000}),
        ("glm", {"num_nextn_predict_layers": 10**12}),
        ("llama", {"num_hidden_layers": 10**15}),
    ],
)
def test_more_layers_than_tensors_are_refused_before_they_are_named(tmp_path, name, changes):
    """Each tensor of each would have been written down first."""
    folder = write_folder(tmp_path / "model", name)
    config = pretrained.read_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match="config.json: .* need more tensors than the"):
        pretrained.read_config(folder)
    layers = dataclasses.replace(config, num_layers=10**9)
    with pytest.raises(ValueError, match="need more tensors than the"):
        pretrained.load(folder, layers)


def test_null_is_as_good_as_nothing(tmp_path):
    folder = write_folder(tmp_path / "model", "llama")
    raw = json.loads((folder / "config.json").read_text())
    found = architectures.from_json({k: v for k, v in raw.items() if k != "rope_theta"})
    nulls = ("rope_theta", "rope_scaling", "torch_dtype", "head_dim", "attention_bias")
    given = raw | dict.fromkeys(nulls) | {"dtype": "float32", "tie_word_embeddings": None}
    assert architectures.from_json(given) == found


MIMO_7B = {
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "model_type": "mimo",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 640000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151680,
}
GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_qk_norm": False,
    "vocab_size": 151552,
}


@pytest.mark.parametrize(
    ("raw", "config"),
    [(MIMO_7B, paper.mimo_7b()), (GLM_4_5_AIR, paper.glm_4_5_air())],
    ids=["MiMo-7B", "GLM-4.5-Air"],
)
def test_the_papers_models_are_those_of_their_config_files(raw, config):
    """And their tensors have the published names: 16 of a MiMo module, a layer after the last."""
    found = architectures.from_json(raw)
    assert architectures.architecture(found) == architectures.architecture(config)
    assert found.mtp.concatenation == config.mtp.concatenation
    assert architectures.from_json(architectures.to_json(found)) == found
    tensors = [name for leaf in names.stored_leaves(found).values() for name in leaf.names.values()]
    assert len(set(tensors)) == len(tensors)
    module = [name for name in tensors if name.startswith(names.module_prefix(0, found))]
    assert module[0].startswith("model.mtp_layers.0." if found.moe is None else "model.layers.46.")
    # Of a mixture: attention and norms 9, router 2, shared 3, experts 3 each, and 4 of the module.
    assert len(module) == (16 if found.moe is None else 9 + 2 + 3 + 3 * 128 + 4)


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", (4, 4)), ("qwen3", (4, 128)), ("glm", (4, 4))]
)
def test_fields_that_are_left_out_have_the_familys_defaults(name, expected):
    left_out = ("num_key_value_heads", "head_dim", "partial_rotary_factor")
    raw = {key: value for key, value in CASES[name].items() if key not in left_out}
    config = architectures.from_json(raw)
    assert (config.num_kv_heads, config.head_dim) == expected
    assert config.rotary_fraction == (0.5 if name == "glm" else 1.0)


def test_newer_config_files_say_the_same(tmp_path):
    """transformers 5 writes `dtype` and `rope_parameters`."""
    folder = write_folder(tmp_path / "model", "glm with options")
    before = pretrained.read_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    rope = {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}
    rope["partial_rotary_factor"] = raw.pop("partial_rotary_factor")
    raw |= {"dtype": raw.pop("torch_dtype"), "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(raw))
    assert pretrained.read_config(folder) == before


def test_pickled_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights only .*safe_serialization=True"):
        pretrained.load(folder)


def _index(folder, **weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_broken_folders_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        pretrained.load(tmp_path / "nothing")
    folder = write_folder(tmp_path / "model", "llama")
    _index(folder, a="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="not in the folder:\n  model-00001"):
        pretrained.load(folder)
    _index(folder, a="../model/model.safetensors")
    with pytest.raises(ValueError, match="not in the folder"):
        pretrained.load(folder)
    _index(folder, a="model.safetensors")
    with pytest.raises(ValueError, match="do not hold:\n  a"):
        pretrained.load(folder)
    tensors = load_file(folder / "model.safetensors")
    old = {"model.norm.weight": tensors["model.norm.weight"] + 1}
    save_file(old, folder / "model-2.safetensors")
    _index(folder, **dict.fromkeys(tensors, "model.safetensors"), b="model-2.safetensors")
    with pytest.raises(ValueError, match="norm.weight: in model-2.* by the index in model.safet"):
        pretrained.load(folder)  # whichever file came last had won
    (folder / "model.safetensors.index.json").unlink()
    whole_numbers = {**tensors, "model.norm.weight": np.arange(16, dtype=np.int32)}
    save_file(whole_numbers, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: tensor 'model.norm.weight' is of typ"):
        pretrained.load(folder)
    save_file(tensors, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        pretrained.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        pretrained.load(folder)


# -- modules that are not there -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mimo", "glm"])
def test_modules_that_other_tools_dropped(tmp_path, name):
    """transformers saves GLM without its MTP layer, and a config.json that still counts it."""
    prefix = {"mimo": MIMO, "glm": GLM}[name]
    tensors = published.tensors(CASES[name])
    kept = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    folder = published.write(tmp_path / "model", CASES[name], kept)
    with pytest.warns(pretrained.PretrainedWarning, match=r"the files hold none.*attach"):
        model = pretrained.load(folder)
    assert model.config.mtp.num_modules == 0
    assert "mtp" not in model.params
    assert error(logits(model)[0], EXPECTED[f"{name}/main"]) < TOLERANCE


ATTACHED = [("llama", "last_block"), ("glm", "last_block"), ("qwen3 tied", "random")]


def bare(tmp_path, name):
    """A model without modules, and its folder."""
    raw = CASES[name] | {"num_nextn_predict_layers": 0}
    folder = published.write(tmp_path / "bare", raw, published.tensors(raw))
    return pretrained.load(folder), folder


@pytest.mark.parametrize(("name", "init"), ATTACHED)
def test_attached_modules_are_new_and_the_model_is_what_it_was(tmp_path, name, init):
    model, folder = bare(tmp_path, name)
    before, _ = logits(model)
    with pytest.warns(pretrained.PretrainedWarning, match=r"2 MTP module.* NEVER TRAINED"):
        attached = pretrained.attach(model, num_modules=2, init=init, seed=3)
    config, params, rest = attached.config, attached.params, attached.rest
    shapes = abstract_policy(config)
    assert jax.tree.map(jnp.shape, attached) == jax.tree.map(jnp.shape, shapes)
    main, ahead = logits(attached)
    np.testing.assert_array_equal(main, before)
    assert ahead.shape[0] == 2 and np.isfinite(ahead).all()
    last = jax.tree.map(lambda leaf: leaf[-1], (model.params["layers"], model.rest.get("layers")))
    block = params["mtp"]["1"]["block"], rest.get("mtp", {}).get("1", {}).get("block")
    same = jax.tree.map(np.array_equal, last, block)
    assert all(jax.tree.leaves(same)) == (init == "last_block")
    for like in (folder, None):
        target = tmp_path / f"saved-{like is None}"
        pretrained.save(target, attached, like=like)
        again = pretrained.load(target)
        assert again.config.mtp == config.mtp
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
        jax.tree.map(np.testing.assert_array_equal, again.rest, rest)


def test_modules_of_every_kind_survive_the_round_trip(tmp_path):
    """What config.json has no field for is written under a key of its own."""
    model, folder = bare(tmp_path, "llama")
    model = configured(model, kind="parallel", own_final_norm=False)
    with pytest.warns(pretrained.PretrainedWarning):
        attached = pretrained.attach(model, num_modules=1)
    pretrained.save(tmp_path / "saved", attached, like=folder)
    again = pretrained.load(tmp_path / "saved")
    assert again.config.mtp == attached.config.mtp
    jax.tree.map(np.testing.assert_array_equal, again.params, attached.params)


def test_a_dense_model_has_no_place_for_a_modules_own_head(tmp_path):
    model, folder = bare(tmp_path, "llama")
    model = configured(model, own_output_head=True)
    with pytest.warns(pretrained.PretrainedWarning):
        attached = pretrained.attach(model, num_modules=1)
    np.testing.assert_array_equal(
        attached.params["mtp"]["0"]["output_head"]["kernel"],
        attached.params["output_head"]["kernel"],
    )
    with pytest.raises(ValueError, match="'mtp/0/output_head/kernel' has no published name"):
        pretrained.save(tmp_path / "saved", attached, like=folder)


def test_attach_refuses_what_makes_no_sense(tmp_path, unchecked):
    model = pretrained.load(write_folder(tmp_path / "model", "mimo"))
    with pytest.raises(ValueError, match="has 1 MTP module"):
        pretrained.attach(model, num_modules=1)
    bare = configured(model, num_modules=0)
    with pytest.raises(ValueError, match="num_modules must be >= 1"):
        pretrained.attach(bare, num_modules=0)
    with pytest.raises(ValueError, match="init must be"):
        pretrained.attach(bare, num_modules=1, init="zero")
