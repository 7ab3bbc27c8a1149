"""Architecture of the decoder and its MTP modules: frozen dataclasses, validated at once."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from occ.checks import validate

DTYPES = ("float32", "bfloat16", "float16", "float64")
LORA_KERNELS = ("query", "key", "value", "output", "gate", "up", "down")
"""Kernels that may have adapters, by the layer's name."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """The multi-token prediction modules beside the next-token head.

    Attributes:
      num_modules: K; 0 is a plain decoder.
      kind: "sequential" modules see the embedding of the token k ahead (DeepSeek-V3, MiMo);
        "parallel" heads see the trunk's hidden state alone (Gloeckle et al. 2024) and so must plan.
      hidden_after_final_norm: module 1 takes the trunk's hidden state after its final norm.
      concatenation: order before the projection, "hidden_embedding" (MiMo) or "embedding_hidden"
        (ports of GLM, DeepSeek).
      own_final_norm: a final norm of the module's own before the shared output head; otherwise the
        trunk's is shared.
      zero_first_embedding: the embedding is zeroed where the position is 0, as some serving code
        for MiMo does.
      own_embedding: sequential modules look tokens up in an embedding of their own instead of the
        trunk's, as a checkpoint may store one that is no copy.
      own_output_head: likewise for the output head.
    """

    num_modules: int = 1
    kind: Literal["sequential", "parallel"] = "sequential"
    hidden_after_final_norm: bool = False
    concatenation: Literal["hidden_embedding", "embedding_hidden"] = "hidden_embedding"
    own_final_norm: bool = True
    zero_first_embedding: bool = False
    own_embedding: bool = False
    own_output_head: bool = False

    def __post_init__(self):
        validate(self)
        _require(
            not (self.own_embedding and self.kind == "parallel"),
            "MTPConfig.own_embedding is for kind='sequential': parallel heads look no token up.",
        )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts MLP in the form of GLM-4.5 and DeepSeek-V3.

    Attributes:
      num_experts: E routed experts.
      experts_per_token: top-k.
      expert_width: hidden width of one expert.
      num_shared_experts: experts that every token visits, as one MLP of that many widths.
      first_dense_layers: leading layers of the trunk with a dense MLP instead.
      routed_scaling: factor on the routed experts' sum.
      normalise_top_k: gates of the chosen experts are divided by their sum.
      num_groups, top_groups: experts are chosen from the best `top_groups` of `num_groups` groups,
        a group's score being the sum of its best two.
      capacity_factor: bounds the buffers in which tokens travel between devices that share the
        experts, as a multiple of an even spread; pairs beyond it are dropped and counted. None
        takes the worst case, and drops nothing.
    """

    num_experts: int
    experts_per_token: int
    expert_width: int
    num_shared_experts: int = 1
    first_dense_layers: int = 1
    routed_scaling: float = 1.0
    normalise_top_k: bool = True
    num_groups: int = 1
    top_groups: int = 1
    capacity_factor: float | None = None

    def __post_init__(self):
        validate(self)
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            "MoEConfig.experts_per_token must be between 1 and num_experts="
            f"{self.num_experts}, got {self.experts_per_token}.",
        )
        _require(
            self.num_experts % self.num_groups == 0 and 1 <= self.top_groups <= self.num_groups,
            f"MoEConfig: {self.num_experts} experts do not fall into {self.num_groups} equal "
            f"groups of which {self.top_groups} are chosen.",
        )
        reachable = self.num_experts // self.num_groups * self.top_groups
        _require(
            self.experts_per_token <= reachable,
            f"MoEConfig.experts_per_token={self.experts_per_token} exceeds the {reachable} experts "
            "in the chosen groups.",
        )


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters beside kernels of the trunk, all else of which is frozen.

        y = x W + (alpha / rank) (x A) B,   W frozen,   A [inputs, rank],   B [rank, outputs]

    A begins uniform in +-1 / sqrt(inputs), B at 0, so that training begins at the model itself. MTP
    modules are trained whole. Embedding, norms, biases, routers, output head and the kernels of
    routed experts have no adapters.

    Attributes:
      rank: r, columns of A.
      alpha: of the factor alpha / rank, which is fixed so that a learning rate serves every rank.
      kernels: which have adapters, of `LORA_KERNELS`; "gate", "up" and "down" are those of dense
        MLPs and of shared experts.
      frozen_dtype: of the stored trunk; None is `param_dtype`, which is then that of adapters and
        MTP modules alone. "bfloat16", as published, holds half the bytes, and no gradient is added
        to it.
      quantised: "int8" stores the trunk's kernels of `LORA_KERNELS`, adapted or not, in eight bits
        with a float32 scale for each output (embedding, output head, routers and the kernels of
        routed experts stay in `frozen_dtype`). They are rounded once, from `frozen_dtype`, when
        adapters are attached; adapters learn beside what is left.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685,
    section 4.1; A as in Hugging Face's PEFT. Dettmers et al., QLoRA, arXiv 2305.14314, for adapters
    beside a quantised trunk (theirs in four bits).
    """

    rank: int = 16
    alpha: float = 32.0
    kernels: tuple[str, ...] = LORA_KERNELS
    frozen_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    quantised: Literal["none", "int8"] = "none"

    def __post_init__(self):
        validate(self)
        known = [name for name in self.kernels if name in LORA_KERNELS]
        _require(
            len(set(known)) == len(self.kernels) > 0,
            f"LoRAConfig.kernels must be different names among {LORA_KERNELS}, and one at least, "
            f"got {self.kernels}.",
        )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies slowed down for contexts that are longer than those trained on.

        linear:  f / factor
        llama3:  f where the wavelength is short, f / factor where it is long, and in between
                 (1 - s) f / factor + s f,   s = (original_length f / 2 pi - low) / (high - low)

    Attributes:
      kind: "linear" or "llama3".
      factor: by which the slow frequencies are divided.
      low, high: turns within the original length up to which a frequency is slow, and from which
        it is fast; of "llama3".
      original_length: tokens, of the context before; of "llama3".

    Reference: Chen et al., Extending Context Window of Large Language Models via Positional
    Interpolation, arXiv 2306.15595; Llama team, The Llama 3 Herd of Models, arXiv 2407.21783.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        validate(self)
        _require(
            self.low < self.high,
            f"RopeScaling.low ({self.low}) must be below high ({self.high}).",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama / Qwen / MiMo / GLM family.

    Attributes:
      vocab_size: V, tokens.
      num_layers: of the trunk.
      width: D.
      num_heads, num_kv_heads, head_dim: of grouped-query attention.
      mlp_width: hidden width of the dense SwiGLU MLP.
      max_length: longest sequence, tokens; also the context that generation may fill.
      rope_base: of the rotary frequencies.
      rope_scaling: of the same, for long contexts; None is none.
      rotary_fraction: share of head_dim that is rotated (GLM: 0.5).
      norm_epsilon: of RMSNorm.
      qkv_bias: biases on query, key and value (Qwen2, MiMo).
      qk_norm: RMSNorm on every query and key head (Qwen3, GLM option).
      tied_embeddings: the output head is the embedding.
      param_dtype: of stored parameters; with adapters, of those that are trained.
      compute_dtype: of activations and matrix products; norms, softmax and logits are at least
        float32.
      scan_layers: run the layers in a loop (compiles once) instead of unrolled. Parameters have a
        leading layer axis either way.
      remat: what the backward pass recomputes: "none", "full" (all of a layer) or "dots" (all but
        matrix products).
      attention: of whole sequences: "xla" leaves it to the compiler, "splash" is Pallas's kernel
        for TPUs, "cudnn" NVIDIA's for GPUs, in 16 bits; "auto" is "cudnn" on GPUs where dtype and
        head_dim allow it, and else "xla".
      attention_chunk: queries whose attention scores exist at one time; 0 is all of them. With
        a kernel it is not needed.
      decode_attention: of new tokens to a cache: "xla" leaves it to the compiler; "pallas" is this
        package's kernel for GPUs and TPUs, in 32 or 16 bits; "auto" is that on GPUs where dtype and
        head_dim allow it, and else "xla".
      moe: mixture of experts; None is dense.
      mtp: the MTP modules.
      lora: adapters of a frozen trunk; None trains all parameters.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    param_dtype: str = dataclasses.field(default="float32", metadata={"one_of": DTYPES})
    compute_dtype: str = dataclasses.field(default="float32", metadata={"one_of": DTYPES})
    scan_layers: bool = True
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    attention_chunk: int = 0
    decode_attention: Literal["auto", "xla", "pallas"] = "auto"
    moe: MoEConfig | None = None
    mtp: MTPConfig = dataclasses.field(default_factory=MTPConfig)
    lora: LoRAConfig | None = None

    def __post_init__(self):
        validate(self)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"ModelConfig.num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
            f"({self.num_kv_heads}).",
        )
        _require(
            self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim,
            f"ModelConfig: head_dim * rotary_fraction = {self.head_dim * self.rotary_fraction} "
            "must be an even number of at most head_dim, since rotary positions turn pairs.",
        )
        if self.moe is not None:
            _require(
                0 <= self.moe.first_dense_layers < self.num_layers,
                f"MoEConfig.first_dense_layers must be below num_layers={self.num_layers}, got "
                f"{self.moe.first_dense_layers}.",
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def compute(self) -> jnp.dtype:
        """`compute_dtype` as a dtype."""
        return jnp.dtype(self.compute_dtype)

    @property
    def params(self) -> jnp.dtype:
        """`param_dtype` as a dtype."""
        return jnp.dtype(self.param_dtype)

    @property
    def base(self) -> jnp.dtype:
        """The dtype of the model's own stored parameters, which adapters are not."""
        frozen = None if self.lora is None else self.lora.frozen_dtype
        return self.params if frozen is None else jnp.dtype(frozen)

    @property
    def whole(self) -> ModelConfig:
        """The same architecture without adapters, all of it in `param_dtype`."""
        return dataclasses.replace(self, lora=None)
