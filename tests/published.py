"""Tiny random checkpoints in the published layouts, written with no code of the project.

Names and shapes are spelt out from config.json, as the models' authors publish them.
"""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

COMMON = {
    "vocab_size": 13,
    "hidden_size": 16,  # square matrices, which a wrong transposition fits
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GLM_FIELDS = {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "head_dim": 8,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 5,
    "num_experts_per_tok": 2,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "use_qk_norm": False,
    "num_nextn_predict_layers": 1,
}


def dense(model_type, architecture, **changes):
    return COMMON | {"model_type": model_type, "architectures": [architecture]} | changes


CASES = {
    "llama": dense("llama", "LlamaForCausalLM"),
    "llama tied, llama3 rope": dense(
        "llama", "LlamaForCausalLM", tie_word_embeddings=True, rope_scaling=LLAMA3
    ),
    "llama linear rope": dense(
        "llama",
        "LlamaForCausalLM",
        head_dim=6,
        num_key_value_heads=4,
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "qwen2": dense("qwen2", "Qwen2ForCausalLM"),
    "qwen3": dense("qwen3", "Qwen3ForCausalLM", head_dim=8),
    "qwen3 tied": dense("qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True),
    "mimo": dense("mimo", "MiMoForCausalLM", num_nextn_predict_layers=1),
    "glm": COMMON | GLM_FIELDS,
    "glm with options": COMMON
    | GLM_FIELDS
    | {
        "num_hidden_layers": 3,
        "use_qk_norm": True,
        "attention_bias": False,
        "n_shared_experts": 2,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "norm_topk_prob": False,
    },
}


LAYER, MIMO, GLM = "model.layers.1.", "model.mtp_layers.0.", "model.layers.2."
TOKENS = np.random.default_rng(1).integers(0, COMMON["vocab_size"], (2, 10)).astype(np.int32)


def shapes(raw):
    """Shape of every tensor by name."""
    width, vocab = raw["hidden_size"], raw["vocab_size"]
    found = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not raw["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, width)
    moe = raw["model_type"] == "glm4_moe"
    for layer in range(raw["num_hidden_layers"]):
        sparse = moe and layer >= raw["first_k_dense_replace"]
        found |= _block(raw, f"model.layers.{layer}.", sparse)
    for number in range(raw.get("num_nextn_predict_layers", 0)):
        found |= _glm_module(raw, number) if moe else _mimo_module(raw, number)
    return found


def _block(raw, prefix, sparse):
    width, size = raw["hidden_size"], raw["head_dim"]
    queries, keys = raw["num_attention_heads"] * size, raw["num_key_value_heads"] * size
    attention = f"{prefix}self_attn."
    found = {
        f"{prefix}input_layernorm.weight": (width,),
        f"{prefix}post_attention_layernorm.weight": (width,),
        f"{attention}q_proj.weight": (queries, width),
        f"{attention}k_proj.weight": (keys, width),
        f"{attention}v_proj.weight": (keys, width),
        f"{attention}o_proj.weight": (width, queries),
    }
    if raw["model_type"] in ("qwen2", "mimo") or raw.get("attention_bias"):
        found[f"{attention}q_proj.bias"] = (queries,)
        found[f"{attention}k_proj.bias"] = found[f"{attention}v_proj.bias"] = (keys,)
    if raw["model_type"] == "qwen3" or raw.get("use_qk_norm"):
        found[f"{attention}q_norm.weight"] = found[f"{attention}k_norm.weight"] = (size,)
    if not sparse:
        return found | _mlp(f"{prefix}mlp.", width, raw["intermediate_size"])
    hidden, experts = raw["moe_intermediate_size"], raw["n_routed_experts"]
    found[f"{prefix}mlp.gate.weight"] = (experts, width)
    found[f"{prefix}mlp.gate.e_score_correction_bias"] = (experts,)
    found |= _mlp(f"{prefix}mlp.shared_experts.", width, hidden * raw["n_shared_experts"])
    for expert in range(experts):
        found |= _mlp(f"{prefix}mlp.experts.{expert}.", width, hidden)
    return found


def _mlp(prefix, width, hidden):
    return {
        f"{prefix}gate_proj.weight": (hidden, width),
        f"{prefix}up_proj.weight": (hidden, width),
        f"{prefix}down_proj.weight": (width, hidden),
    }


def _mimo_module(raw, number):
    width, prefix = raw["hidden_size"], f"model.mtp_layers.{number}."
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    found = {f"{prefix}{norm}.weight": (width,) for norm in norms}
    found[f"{prefix}input_proj.weight"] = (width, 2 * width)
    return found | _block(raw, prefix, sparse=False)


def _glm_module(raw, number):
    width, vocab = raw["hidden_size"], raw["vocab_size"]
    prefix = f"model.layers.{raw['num_hidden_layers'] + number}."
    found = {f"{prefix}{norm}.weight": (width,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    found[f"{prefix}eh_proj.weight"] = (width, 2 * width)
    found[f"{prefix}embed_tokens.weight"] = found[f"{prefix}shared_head.head.weight"] = (
        vocab,
        width,
    )
    return found | _block(raw, prefix, sparse=True)


def tensors(raw, seed=0):
    """Random tensors: no norm is 1, no bias 0; the modules' embedding and head are copies."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(raw).items():
        normal = rng.normal(size=shape)
        if "norm" in name:
            normal = 1 + 0.3 * normal
        elif len(shape) == 1:
            normal = 0.3 * normal
        else:
            normal = 1.5 * shape[-1] ** -0.5 * normal
        found[name] = normal.astype(np.float32)
    for name in found:
        if name.endswith("embed_tokens.weight"):
            found[name] = found["model.embed_tokens.weight"].copy()
        if name.endswith("shared_head.head.weight"):
            found[name] = found["lm_head.weight"].copy()
    return found


def write(folder, raw, values, dtype="float32", wide=("e_score_correction_bias",)):
    """A folder of one file; tensors with such endings are float32 whatever the rest is."""
    folder.mkdir(parents=True)
    chosen = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    stored = {
        name: value if name.endswith(wide) else value.astype(chosen)
        for name, value in values.items()
    }
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": dtype}))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_folder(folder, name, dtype="float32", seed=0):
    return write(folder, CASES[name], tensors(CASES[name], seed), dtype)
