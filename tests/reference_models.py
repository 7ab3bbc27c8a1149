"""The decoder's forward pass in numpy float64 loops, and random models to compare it with.

Written from the papers' formulas and the docstrings: one row, one token, one head and one expert
at a time, with no cache, no sorting and no broadcasting that could hide a wrong axis.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from occ.models.config import ModelConfig, MoEConfig, MTPConfig
from occ.models.decoder import Decoder, merge_model, split_model

MOE = MoEConfig(num_experts=6, experts_per_token=2, expert_width=5)


class Output(NamedTuple):
    hidden: np.ndarray  # [B, T, D], before the final norm
    logits: np.ndarray  # [B, T, V]
    load: np.ndarray  # [sparse layers, E]
    mtp_hidden: np.ndarray  # [K, B, T, D]
    mtp_logits: np.ndarray  # [K, B, T, V]


def small_config(heads=0, dtype="float64", mtp=None, **changes):
    """A decoder with grouped queries; `mtp` changes fields of its MTPConfig."""
    fields = {
        "vocab_size": 13,
        "num_layers": 2,
        "width": 12,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "mlp_width": 10,
        "max_length": 24,
        "rope_base": 100.0,
        "param_dtype": dtype,
        "compute_dtype": dtype,
        "mtp": MTPConfig(num_modules=heads, **(mtp or {})),
    }
    return ModelConfig(**(fields | changes))


def random_model(config, seed=0):
    """`split_model` of a model in which no scale is 1 and no bias is 0."""
    return _random_model(config, seed, jax.config.jax_enable_x64)


@functools.cache
def _random_model(config, seed, x64):
    """Only shapes come from the model: numpy draws the values, which spares compilations."""
    graphdef, *shapes = split_model(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        normal = rng.normal(size=leaf.shape)
        name = path[-1].key
        if name == "scale":
            normal = 1 + 0.3 * normal
        elif "bias" in name:
            normal = 0.3 * normal
        else:
            fan_in = leaf.shape[-1] if name == "embedding" else leaf.shape[-2]
            normal = 1.5 * fan_in**-0.5 * normal
        return jnp.asarray(normal, leaf.dtype)

    return graphdef, *jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, rest, tokens, positions, segment_ids):
    """All outputs of the model under test; most tests share shapes, and so compilations."""
    model = merge_model(graphdef, params, rest)
    trunk = model.trunk(tokens, positions, segment_ids)
    logits, mtp_logits = model(tokens, positions, segment_ids)
    states = None
    if model.config.mtp.num_modules:
        states = model.mtp_hidden(trunk.hidden, tokens, positions, segment_ids)
    return Output(trunk.hidden, logits, trunk.router_load, states, mtp_logits)


def rows(config, lengths, time, side="right", seed=0):
    """Tokens, positions and segment ids of one sequence a row, padded with garbage."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (len(lengths), time)).astype(np.int32)
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else time - length
        positions[row, start : start + length] = np.arange(length)
        segment_ids[row, start : start + length] = 1
    return tokens, positions, segment_ids


def packed(lengths, time, config, seed=0):
    """Two rows, each of which holds sequences of these lengths, and padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (2, time)).astype(np.int32)
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    start = 0
    for number, length in enumerate(lengths, start=1):
        positions[:, start : start + length] = np.arange(length)
        segment_ids[:, start : start + length] = number
        start += length
    return tokens, positions, segment_ids


# ---------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------


def forward(params, rest, config, tokens, positions, segment_ids, replayed=None):
    """The whole model on numpy arrays [B, T]; `replayed` are experts [L, k, B, T]."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    rest = jax.tree.map(lambda a: np.asarray(a, np.float64), rest)
    experts = config.moe.num_experts if config.moe else 0
    stacks = [name for name in ("dense_layers", "layers") if name in params]
    loads = np.zeros((config.num_layers - config.moe.first_dense_layers if experts else 0, experts))
    results = []
    for row in range(tokens.shape[0]):
        row_inputs = tokens[row], positions[row], segment_ids[row]
        hidden = [params["embedding"]["embedding"][t] for t in tokens[row]]
        for name in stacks:
            for layer in range(len(params[name]["attention_norm"]["scale"])):
                block_params = jax.tree.map(lambda a, i=layer: a[i], params[name])
                block_rest = jax.tree.map(lambda a, i=layer: a[i], rest.get(name, {}))
                inputs = block_params, block_rest, config, *row_inputs[1:]
                if "router" in block_params["mlp"]:
                    again = None if replayed is None else replayed[layer, :, row]
                    hidden = block(hidden, *inputs, loads[layer], again)
                else:
                    hidden = block(hidden, *inputs)
        logits = [readout(params, params["final_norm"]["scale"], h, config) for h in hidden]
        results.append((hidden, logits, *mtp(hidden, params, rest, config, *row_inputs)))
    hidden, logits, states, ahead = (np.array(part) for part in zip(*results, strict=True))
    if config.mtp.num_modules:
        states, ahead = np.moveaxis(states, 1, 0), np.moveaxis(ahead, 1, 0)
    return Output(hidden, logits, loads, states, ahead)


def rms_norm(x, scale, epsilon):
    mean_square = sum(value * value for value in x) / len(x)
    return np.array([v / np.sqrt(mean_square + epsilon) * s for v, s in zip(x, scale, strict=True)])


def rotate(x, position, config):
    """Dimension i turns with i + dim / 2 by the angle position * base^(-2 i / dim)."""
    y = x.copy()
    dim = int(config.head_dim * config.rotary_fraction)
    for i in range(dim // 2):
        angle = position * config.rope_base ** (-2 * i / dim)
        a, b = x[i], x[i + dim // 2]
        y[i] = a * np.cos(angle) - b * np.sin(angle)
        y[i + dim // 2] = b * np.cos(angle) + a * np.sin(angle)
    return y


def project(x, linear):
    y = linear["kernel"].T @ x
    return y + linear["bias"] if "bias" in linear else y


def head(x, number, params, name, position, config):
    """Query or key of one head, normed and turned."""
    size = config.head_dim
    y = project(x, params[name])[number * size : (number + 1) * size]
    if config.qk_norm:
        y = rms_norm(y, params[f"{name}_norm"]["scale"], config.norm_epsilon)
    return rotate(y, position, config)


def attention(xs, params, config, positions, segment_ids):
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    outputs = []
    for t in range(len(xs)):
        mixed = []
        for number in range(config.num_heads):
            shared = number // group
            query = head(xs[t], number, params, "query", positions[t], config)
            scores, values = [], []
            for j in range(t + 1):
                if segment_ids[j] == segment_ids[t]:
                    key = head(xs[j], shared, params, "key", positions[j], config)
                    scores.append(float(query @ key) / np.sqrt(size))
                    value = project(xs[j], params["value"])
                    values.append(value[shared * size : (shared + 1) * size])
            weights = np.exp(np.array(scores) - max(scores))
            weights = weights / weights.sum()
            mixed.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        outputs.append(project(np.concatenate(mixed), params["output"]))
    return outputs


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, gate, up, down):
    return down.T @ (silu(gate.T @ x) * (up.T @ x))


def mlp(x, params):
    return swiglu(x, *(params[name]["kernel"] for name in ("gate", "up", "down")))


def route(x, params, bias, moe, replayed):
    """The chosen experts, or those that are replayed, and their gates: {expert: gate}."""
    score = [1 / (1 + np.exp(-float(column @ x))) for column in params["router"].T]
    choice = [s + b for s, b in zip(score, bias, strict=True)]
    size = moe.num_experts // moe.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(moe.num_groups)]
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: moe.top_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: moe.experts_per_token]
    if replayed is not None:
        chosen = [int(e) for e in replayed]
    total = sum(score[e] for e in chosen) if moe.normalise_top_k else 1.0
    return {e: moe.routed_scaling * score[e] / total for e in chosen}


def mixture(x, params, bias, moe, valid, load, replayed=None):
    """One token; padding visits the shared experts alone."""
    y = np.zeros_like(x)
    if valid:
        for e, gate in route(x, params, bias, moe, replayed).items():
            kernels = (params[f"{name}_kernel"][e] for name in ("gate", "up", "down"))
            y = y + gate * swiglu(x, *kernels)
            load[e] += 1
    return y + mlp(x, params["shared"]) if moe.num_shared_experts else y


def block(xs, params, rest, config, positions, segment_ids, load=None, replayed=None):
    def norm(x, name):
        return rms_norm(x, params[name]["scale"], config.norm_epsilon)

    mixed = attention(
        [norm(x, "attention_norm") for x in xs], params["attention"], config, positions, segment_ids
    )
    xs = [x + m for x, m in zip(xs, mixed, strict=True)]
    outputs = []
    for t, (x, segment) in enumerate(zip(xs, segment_ids, strict=True)):
        normal = norm(x, "mlp_norm")
        if "router" in params["mlp"]:
            load = np.zeros(config.moe.num_experts) if load is None else load
            bias = rest["mlp"]["router_bias"]
            again = None if replayed is None else replayed[:, t]
            update = mixture(normal, params["mlp"], bias, config.moe, segment > 0, load, again)
        else:
            update = mlp(normal, params["mlp"])
        outputs.append(x + update)
    return outputs


def readout(params, scale, x, config):
    normal = rms_norm(x, scale, config.norm_epsilon)
    if "output_head" not in params:
        return params["embedding"]["embedding"] @ normal
    return project(normal, params["output_head"])


def mtp(hidden, params, rest, config, tokens, positions, segment_ids):
    """States and logits of the K modules on one row."""
    if config.mtp.hidden_after_final_norm:
        scale = params["final_norm"]["scale"]
        hidden = [rms_norm(h, scale, config.norm_epsilon) for h in hidden]
    states, logits, before = [], [], hidden
    for k in range(1, config.mtp.num_modules + 1):
        module = params["mtp"][str(k - 1)]
        module_rest = rest.get("mtp", {}).get(str(k - 1), {}).get("block", {})
        inputs = hidden
        if config.mtp.kind == "sequential":
            inputs = [
                join(before[i], k, i, module, params, config, tokens, positions, segment_ids)
                for i in range(len(tokens))
            ]
        state = block(inputs, module["block"], module_rest, config, positions, segment_ids)
        own = config.mtp.own_final_norm
        scale = (module if own else params)["final_norm"]["scale"]
        states.append(state)
        head_of = module if config.mtp.own_output_head else params
        logits.append([readout(head_of, scale, h, config) for h in state])
        before = state
    return states, logits


def join(state, k, i, module, params, config, tokens, positions, segment_ids):
    """W [norm(state at i); norm(embedding of token i + k)]."""
    inside = i + k < len(tokens) and segment_ids[i + k] == segment_ids[i]
    table = (module if config.mtp.own_embedding else params)["embedding"]["embedding"]
    ahead = table[tokens[i + k] if inside else 0]
    if config.mtp.zero_first_embedding and positions[i] == 0:
        ahead = np.zeros_like(ahead)
    pair = [
        rms_norm(state, module["hidden_norm"]["scale"], config.norm_epsilon),
        rms_norm(ahead, module["embedding_norm"]["scale"], config.norm_epsilon),
    ]
    if config.mtp.concatenation == "embedding_hidden":
        pair.reverse()
    return project(np.concatenate(pair), module["projection"])
