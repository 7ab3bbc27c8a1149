"""Models out of GGUF files, the format of llama.cpp; of the Llama architecture alone.

Weights are dequantised as they are read, one tensor after another. Two conventions differ from
ours: matrices are stored as [outputs, inputs], and the rows of query and key heads are in the order
of rotary positions that turn neighbouring dimensions (2 i with 2 i + 1), which is undone here.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from occ.extras import require

require("pretrained", __name__, "gguf")
import gguf
import jax
import numpy as np

from occ.gguf_files import open_gguf
from occ.models.agreement import check_agrees
from occ.models.config import ModelConfig, MTPConfig
from occ.models.policy import Policy, abstract_policy

ARCHITECTURE = "llama"


class _Source(NamedTuple):
    """Where a parameter comes from: a tensor's name, of each layer if it has a layer axis."""

    tensor: str
    convert: Callable[[np.ndarray, ModelConfig], np.ndarray]


def _as_is(values: np.ndarray, config: ModelConfig) -> np.ndarray:
    return values


def _kernel(values: np.ndarray, config: ModelConfig) -> np.ndarray:
    return values.T


def _rotated(values: np.ndarray, config: ModelConfig) -> np.ndarray:
    return half_split(values, config.head_dim, config.rotary_dim).T


TOP = {
    "embedding/embedding": _Source("token_embd.weight", _as_is),
    "final_norm/scale": _Source("output_norm.weight", _as_is),
    "output_head/kernel": _Source("output.weight", _kernel),
}
LAYERS = {
    "layers/attention_norm/scale": _Source("attn_norm.weight", _as_is),
    "layers/attention/query/kernel": _Source("attn_q.weight", _rotated),
    "layers/attention/key/kernel": _Source("attn_k.weight", _rotated),
    "layers/attention/value/kernel": _Source("attn_v.weight", _kernel),
    "layers/attention/output/kernel": _Source("attn_output.weight", _kernel),
    "layers/mlp_norm/scale": _Source("ffn_norm.weight", _as_is),
    "layers/mlp/gate/kernel": _Source("ffn_gate.weight", _kernel),
    "layers/mlp/up/kernel": _Source("ffn_up.weight", _kernel),
    "layers/mlp/down/kernel": _Source("ffn_down.weight", _kernel),
}


def half_split(rows: np.ndarray, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Rows of query or key heads, from neighbouring pairs to the halves that we rotate.

    Args:
      rows: [heads * head_dim, inputs], dimension 2 i of a head turning with 2 i + 1.
      head_dim: of a head.
      rotary_dim: leading dimensions that turn; the others stay.

    >>> half_split(np.arange(6)[:, None], head_dim=6, rotary_dim=4)[:, 0].tolist()
    [0, 2, 1, 3, 4, 5]
    """
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    turned, rest = heads[:, :rotary_dim], heads[:, rotary_dim:]
    return np.concatenate([turned[:, 0::2], turned[:, 1::2], rest], axis=1).reshape(rows.shape)


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """The architecture that a file describes, without MTP modules.

    Raises:
      ValueError: another architecture, or something of this one that the decoder does not have.
    """
    return _named_config(open_gguf(path), path)


def load(
    path: str | pathlib.Path, config: ModelConfig | None = None, *, shardings: Any = None
) -> Policy:
    """Weights of the trunk, and the head.

    Args:
      path: of the .gguf file.
      config: what the file leaves open (dtypes, rematerialisation, a shorter context); its MTP
        modules are left out, since no file has any. None takes what the file says.
      shardings: (params, rest) of shardings; None leaves all on the default device.

    Raises:
      ValueError: as `read_config`; or the configuration and the file disagree; or tensors are
        missing, of another shape, or over.
    """
    reader = open_gguf(path)
    found = _named_config(reader, path)
    if config is None:
        config = found
    check_agrees(config, found, str(path))
    config = dataclasses.replace(config, mtp=MTPConfig(num_modules=0))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_names(tensors, config)
    params: dict[str, Any] = {}
    for name, values in _parameters(tensors, config):
        sharding = None if shardings is None else _at(shardings[0], name)
        _put(params, name, jax.device_put(values, sharding))
    return Policy(config, params, {})


# -- what a file says -------------------------------------------------------------------------


def _named_config(reader: gguf.GGUFReader, path: str | pathlib.Path) -> ModelConfig:
    try:
        return _config(reader)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(reader: gguf.GGUFReader) -> ModelConfig:
    def get(name: str, default: Any = None) -> Any:
        field = reader.get_field(name)
        return default if field is None else field.contents()

    architecture = get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"gguf: the file holds a model of architecture {architecture!r}; only "
            f"{ARCHITECTURE!r} is read. Take the model's folder of safetensors."
        )

    def of(name: str, default: Any = None) -> Any:
        value = get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise ValueError(f"gguf: the file does not say {ARCHITECTURE}.{name}.")
        if isinstance(value, list):
            raise ValueError(f"gguf: {ARCHITECTURE}.{name} varies by layer: {value}.")
        return value

    def number(name: str, default: Any = None) -> Any:
        value = of(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"gguf: {ARCHITECTURE}.{name} must be a number > 0, got {value!r}.")
        return value

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ValueError("gguf: the file holds no tensor token_embd.weight, and so no model.")
    _refuse_what_is_not_here(tensors, of)
    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", width // heads)
    layers = number("block_count")
    if layers > len(tensors) or len(tensors["token_embd.weight"].shape) != 2:
        raise ValueError(
            f"gguf: the file counts {layers} layers and holds {len(tensors)} tensors, of which "
            "token_embd.weight must be a matrix."
        )
    return ModelConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=number("feed_forward_length"),
        max_length=number("context_length"),
        rope_base=_decimal(number("rope.freq_base", 10_000.0)),
        rotary_fraction=number("rope.dimension_count", head_dim) / head_dim,
        norm_epsilon=_decimal(number("attention.layer_norm_rms_epsilon")),
        tied_embeddings="output.weight" not in tensors,
        mtp=MTPConfig(num_modules=0),
    )


def _refuse_what_is_not_here(tensors: dict[str, Any], of: Callable[..., Any]) -> None:
    scaling = of("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(
            f"gguf: the file scales its rotary frequencies ({scaling!r}), which is not read. Take "
            "the model's folder of safetensors."
        )
    if of("expert_count", 0):
        raise ValueError(
            f"gguf: the file holds a mixture of {of('expert_count')} experts; only dense Llama "
            "models are read."
        )


def _decimal(value: float) -> float:
    """The number that was meant, of one that a file holds in float32."""
    return float(str(np.float32(value)))


def _check_names(tensors: dict[str, Any], config: ModelConfig) -> None:
    expected = {source.tensor for name, source in TOP.items() if _has(name, config)}
    expected |= {
        f"blk.{layer}.{source.tensor}"
        for layer in range(config.num_layers)
        for source in LAYERS.values()
    }
    missing, over = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or over:
        raise ValueError(
            f"gguf: the file lacks {missing[:6]} ({len(missing)}) and has {over[:6]} "
            f"({len(over)}) besides what a Llama model of {config.num_layers} layers consists of."
        )


def _has(name: str, config: ModelConfig) -> bool:
    return not (name == "output_head/kernel" and config.tied_embeddings)


# -- its tensors ------------------------------------------------------------------------------


def _parameters(tensors: dict[str, Any], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter, by its path, in the dtype of parameters; one at a time."""
    shapes = abstract_policy(config).params

    def read(tensor: str, convert: Callable[..., np.ndarray], shape: tuple[int, ...]):
        values = _dequantise(tensors[tensor])
        transposed = convert is not _as_is
        if values.shape != (shape[::-1] if transposed else shape):
            raise ValueError(
                f"gguf: tensor {tensor!r} has shape {values.shape}, expected "
                f"{shape[::-1] if transposed else shape} from what the file says of the model."
            )
        return convert(values, config)

    for name, (tensor, convert) in TOP.items():
        if _has(name, config):
            yield name, read(tensor, convert, _at(shapes, name).shape).astype(config.params)
    for name, (tensor, convert) in LAYERS.items():
        shape = _at(shapes, name).shape
        stacked = np.empty(shape, config.params)
        for layer in range(config.num_layers):
            stacked[layer] = read(f"blk.{layer}.{tensor}", convert, shape[1:])
        yield name, stacked


def _dequantise(tensor: Any) -> np.ndarray:
    """float32 [outputs, inputs] of a matrix, [size] of a vector."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *folders, leaf = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[leaf] = value


def _at(tree: Any, name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree
