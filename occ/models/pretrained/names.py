"""Published names of parameters: one table, read by import and by export.

A leaf of ours may be many published tensors: one for each layer of a stack, and for each expert.
Matrices are published as [outputs, inputs] and kept here as [inputs, outputs].

MTP modules have no common names. Dense models store module k as `model.mtp_layers.k` (MiMo),
mixtures of experts as the layers after the last, `model.layers.(num_layers + k)` (GLM-4.5,
DeepSeek-V3).
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import jax
import numpy as np

from occ.models.config import ModelConfig
from occ.models.policy import abstract_policy
from occ.trees import path_string


class Row(NamedTuple):
    """One kind of parameter.

    Attributes:
      ours: path of the leaf, within its block or module.
      theirs: name of the tensor, within its layer; {expert} stands for the expert's number.
      transposed: the last two axes are exchanged.
    """

    ours: str
    theirs: str
    transposed: bool = False


T = True

TRUNK = (
    Row("embedding/embedding", "model.embed_tokens.weight"),
    Row("final_norm/scale", "model.norm.weight"),
    Row("output_head/kernel", "lm_head.weight", T),
)
BLOCK = (
    Row("attention_norm/scale", "input_layernorm.weight"),
    Row("attention/query/kernel", "self_attn.q_proj.weight", T),
    Row("attention/query/bias", "self_attn.q_proj.bias"),
    Row("attention/key/kernel", "self_attn.k_proj.weight", T),
    Row("attention/key/bias", "self_attn.k_proj.bias"),
    Row("attention/value/kernel", "self_attn.v_proj.weight", T),
    Row("attention/value/bias", "self_attn.v_proj.bias"),
    Row("attention/output/kernel", "self_attn.o_proj.weight", T),
    Row("attention/query_norm/scale", "self_attn.q_norm.weight"),
    Row("attention/key_norm/scale", "self_attn.k_norm.weight"),
    Row("mlp_norm/scale", "post_attention_layernorm.weight"),
    Row("mlp/gate/kernel", "mlp.gate_proj.weight", T),
    Row("mlp/up/kernel", "mlp.up_proj.weight", T),
    Row("mlp/down/kernel", "mlp.down_proj.weight", T),
    Row("mlp/router", "mlp.gate.weight", T),
    Row("mlp/router_bias", "mlp.gate.e_score_correction_bias"),
    Row("mlp/gate_kernel", "mlp.experts.{expert}.gate_proj.weight", T),
    Row("mlp/up_kernel", "mlp.experts.{expert}.up_proj.weight", T),
    Row("mlp/down_kernel", "mlp.experts.{expert}.down_proj.weight", T),
    Row("mlp/shared/gate/kernel", "mlp.shared_experts.gate_proj.weight", T),
    Row("mlp/shared/up/kernel", "mlp.shared_experts.up_proj.weight", T),
    Row("mlp/shared/down/kernel", "mlp.shared_experts.down_proj.weight", T),
)
MIMO_MODULE = (
    Row("hidden_norm/scale", "hidden_layernorm.weight"),
    Row("embedding_norm/scale", "token_layernorm.weight"),
    Row("projection/kernel", "input_proj.weight", T),
    Row("final_norm/scale", "final_layernorm.weight"),
)
DEEPSEEK_MODULE = (
    Row("hidden_norm/scale", "hnorm.weight"),
    Row("embedding_norm/scale", "enorm.weight"),
    Row("projection/kernel", "eh_proj.weight", T),
    Row("final_norm/scale", "shared_head.norm.weight"),
    Row("embedding/embedding", "embed_tokens.weight"),
    Row("output_head/kernel", "shared_head.head.weight", T),
)

_LAYER = re.compile(r"(dense_layers|layers)/(.+)")
_MODULE_BLOCK = re.compile(r"mtp/(\d+)/block/(.+)")
_MODULE = re.compile(r"mtp/(\d+)/(.+)")


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one leaf is published.

    Attributes:
      shape, dtype: of the leaf.
      names: of its tensors, by their index into the leaf's leading dimensions.
      transposed: the tensors' two axes are exchanged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    names: dict[tuple[int, ...], str]
    transposed: bool

    @property
    def leading(self) -> int:
        """How many leading dimensions of the leaf are told apart by name."""
        return len(next(iter(self.names)))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor as published."""
        shape = self.shape[self.leading :]
        return shape[::-1] if self.transposed else shape


class Copy(NamedTuple):
    """A tensor that repeats another one, where a checkpoint stores it.

    Attributes:
      name: of the tensor.
      original: name of the tensor that it repeats.
      field: of `MTPConfig`, True where it is no copy but the module's own; None for the output head
        of a model with tied embeddings.
      layer: beginning of the names of its module; None for the same.
    """

    name: str
    original: str
    field: str | None
    layer: str | None


def stored_leaves(config: ModelConfig) -> dict[str, Stored]:
    """How every leaf of a model is published, by path, in the order of the model.

    Raises:
      ValueError: a leaf has no published name; it is named.
    """
    policy = abstract_policy(config)
    return {
        path_string(path): _stored(path_string(path), leaf, config)
        for tree in (policy.params, policy.rest)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def copies(config: ModelConfig) -> list[Copy]:
    """Tensors that may be stored although they repeat others."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    found = []
    if config.tied_embeddings:
        found.append(Copy(head, embedding, None, None))
        head = embedding
    if config.moe is None:
        return found
    for number in range(config.mtp.num_modules):
        layer = module_prefix(number, config)
        if config.mtp.kind == "sequential" and not config.mtp.own_embedding:
            name = f"{layer}embed_tokens.weight"
            found.append(Copy(name, embedding, "own_embedding", layer))
        if not config.mtp.own_output_head:
            name = f"{layer}shared_head.head.weight"
            found.append(Copy(name, head, "own_output_head", layer))
    return found


def module_prefix(number: int, config: ModelConfig) -> str:
    """Beginning of the published names of MTP module `number` (0-based)."""
    if config.moe is None:
        return f"model.mtp_layers.{number}."
    return f"model.layers.{config.num_layers + number}."


def _stored(path: str, leaf: jax.ShapeDtypeStruct, config: ModelConfig) -> Stored:
    row, prefixes = _row(path, leaf, config)
    names = {}
    for index, prefix in prefixes.items():
        if "{expert}" not in row.theirs:
            names[index] = prefix + row.theirs
            continue
        for expert in range(leaf.shape[len(index)]):
            names[*index, expert] = prefix + row.theirs.format(expert=expert)
    return Stored(leaf.shape, np.dtype(leaf.dtype), names, row.transposed)


def _row(
    path: str, leaf: jax.ShapeDtypeStruct, config: ModelConfig
) -> tuple[Row, dict[tuple[int, ...], str]]:
    """The row of a leaf, and the beginnings of its tensors' names by index of the layer axis."""
    table: tuple[Row, ...] = TRUNK
    prefixes: dict[tuple[int, ...], str] = {(): ""}
    rest = path
    if match := _LAYER.fullmatch(path):
        stack, rest = match.groups()
        table = BLOCK
        moe = config.moe
        first = moe.first_dense_layers if moe is not None and stack == "layers" else 0
        prefixes = {(i,): f"model.layers.{first + i}." for i in range(leaf.shape[0])}
    elif match := _MODULE_BLOCK.fullmatch(path):
        rest, table = match.group(2), BLOCK
        prefixes = {(): module_prefix(int(match.group(1)), config)}
    elif match := _MODULE.fullmatch(path):
        rest, table = match.group(2), MIMO_MODULE if config.moe is None else DEEPSEEK_MODULE
        prefixes = {(): module_prefix(int(match.group(1)), config)}
    rows = [row for row in table if row.ours == rest]
    if len(rows) != 1:
        raise ValueError(
            f"pretrained: parameter {path!r} has no published name (dense models, for one, store "
            "no embedding or output head of an MTP module's own). Save a model without it, or add "
            "a row to occ/models/pretrained/names.py."
        )
    return rows[0], prefixes
