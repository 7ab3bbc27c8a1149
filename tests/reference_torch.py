"""Published models in plain torch, from their tensors by published name, MTP modules included.

Written from the papers and from what serving code computes (vLLM's and SGLang's mimo_mtp,
glm4_moe_mtp and glm4_moe_nextn, deepseek_mtp): one sequence, no cache, every expert on every token.

An MTP module at position i has the trunk's hidden state after its final norm at i and the embedding
of token i + 1. All agree on that, on the orders [hidden, embedding] for MiMo and [embedding,
hidden] for GLM and DeepSeek, and on a norm of the module's before the head. They differ in two
things. The embedding at position 0 is zeroed by vLLM for all three and by SGLang for MiMo, and not
by SGLang for GLM and DeepSeek, nor by transformers. Positions count from the hidden state's token
in vLLM and SGLang and from the embedded one in transformers; rotary positions are relative, so that
makes no difference.
"""

import json

import torch
from safetensors.torch import load_file
from torch.nn import functional as F


def read(folder):
    """The tensors of a folder of one file, as leaves of a graph, and its config.json."""
    tensors = load_file(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, raw


def rms_norm(x, weight, raw):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + raw["rms_norm_eps"]) * weight


def rotate(x, positions, raw):
    """x [T, heads, head_dim]; of the first part of each head, either half turns with the other."""
    dim = int(x.shape[-1] * raw.get("partial_rotary_factor", 1.0))
    frequency = raw["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angle = positions[:, None].float() * frequency
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], dim=-1)


def attention(x, tensors, prefix, raw, positions):
    def heads(name):
        weight, bias = tensors[f"{prefix}{name}_proj.weight"], f"{prefix}{name}_proj.bias"
        y = F.linear(x, weight, tensors.get(bias)).view(len(x), -1, raw["head_dim"])
        norm = tensors.get(f"{prefix}{name}_norm.weight")
        return y if norm is None else rms_norm(y, norm, raw)

    query, key = rotate(heads("q"), positions, raw), rotate(heads("k"), positions, raw)
    groups = query.shape[1] // key.shape[1]
    key, value = (y.repeat_interleave(groups, dim=1) for y in (key, heads("v")))
    scores = torch.einsum("thd,shd->hts", query, key) * raw["head_dim"] ** -0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), value)
    return F.linear(mixed.flatten(1), tensors[f"{prefix}o_proj.weight"])


def swiglu(x, tensors, prefix):
    gate, up, down = (tensors[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def mixture(x, tensors, prefix, raw):
    score = F.linear(x, tensors[f"{prefix}gate.weight"]).sigmoid()
    choice = score.detach() + tensors[f"{prefix}gate.e_score_correction_bias"]
    grouped = choice.view(len(x), raw["n_group"], -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(raw["topk_group"], dim=-1).indices
    kept = torch.full_like(grouped, float("-inf")).scatter(
        1, best[..., None].expand(-1, -1, grouped.shape[-1]), 0.0
    )
    chosen = (grouped + kept).flatten(1).topk(raw["num_experts_per_tok"], dim=-1).indices
    gate = torch.zeros_like(score).scatter(1, chosen, score.gather(1, chosen))
    if raw["norm_topk_prob"]:
        gate = gate / gate.sum(-1, keepdim=True)
    total = swiglu(x, tensors, f"{prefix}shared_experts.")
    for expert in range(raw["n_routed_experts"]):
        out = swiglu(x, tensors, f"{prefix}experts.{expert}.")
        total = total + raw["routed_scaling_factor"] * gate[:, expert, None] * out
    return total


def block(x, tensors, prefix, raw, positions):
    normal = rms_norm(x, tensors[f"{prefix}input_layernorm.weight"], raw)
    x = x + attention(normal, tensors, f"{prefix}self_attn.", raw, positions)
    normal = rms_norm(x, tensors[f"{prefix}post_attention_layernorm.weight"], raw)
    if f"{prefix}mlp.gate.weight" in tensors:
        return x + mixture(normal, tensors, f"{prefix}mlp.", raw)
    return x + swiglu(normal, tensors, f"{prefix}mlp.")


def trunk(tensors, raw, tokens, positions):
    """Hidden states [T, D] after the final norm."""
    x = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(raw["num_hidden_layers"]):
        x = block(x, tensors, f"model.layers.{layer}.", raw, positions)
    return rms_norm(x, tensors["model.norm.weight"], raw)


def output_head(tensors):
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


def mimo_module(tensors, raw, hidden, tokens_ahead, positions, zero_first=False):
    prefix = "model.mtp_layers.0."
    ahead = tensors["model.embed_tokens.weight"][tokens_ahead]
    if zero_first:
        ahead = torch.where(positions[:, None] == 0, 0.0, ahead)
    ahead = rms_norm(ahead, tensors[f"{prefix}token_layernorm.weight"], raw)
    hidden = rms_norm(hidden, tensors[f"{prefix}hidden_layernorm.weight"], raw)
    x = F.linear(torch.cat([hidden, ahead], dim=-1), tensors[f"{prefix}input_proj.weight"])
    x = block(x, tensors, prefix, raw, positions)
    normal = rms_norm(x, tensors[f"{prefix}final_layernorm.weight"], raw)
    return F.linear(normal, output_head(tensors))


def glm_module(tensors, raw, hidden, tokens_ahead, positions, zero_first=False):
    prefix = f"model.layers.{raw['num_hidden_layers']}."
    ahead = tensors[f"{prefix}embed_tokens.weight"][tokens_ahead]
    if zero_first:
        ahead = torch.where(positions[:, None] == 0, 0.0, ahead)
    ahead = rms_norm(ahead, tensors[f"{prefix}enorm.weight"], raw)
    hidden = rms_norm(hidden, tensors[f"{prefix}hnorm.weight"], raw)
    x = F.linear(torch.cat([ahead, hidden], dim=-1), tensors[f"{prefix}eh_proj.weight"])
    x = block(x, tensors, prefix, raw, positions)
    normal = rms_norm(x, tensors[f"{prefix}shared_head.norm.weight"], raw)
    return F.linear(normal, tensors[f"{prefix}shared_head.head.weight"])


MODULES = {"mimo": mimo_module, "glm4_moe": glm_module}


def logits(tensors, raw, tokens, positions=None, shift=0, zero_first=False):
    """Main logits [T, V] and, where the model has a module, its logits [T - 1, V].

    `shift` is added to the module's positions.
    """
    if positions is None:
        positions = torch.arange(len(tokens))
    hidden = trunk(tensors, raw, tokens, positions)
    main = F.linear(hidden, output_head(tensors))
    if not raw.get("num_nextn_predict_layers"):
        return main, None
    module = MODULES[raw["model_type"]]
    inputs = hidden[:-1], tokens[1:], positions[:-1] + shift
    return main, module(tensors, raw, *inputs, zero_first=zero_first)
