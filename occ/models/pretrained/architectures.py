"""config.json of published models, as `ModelConfig` and back.

What this code would compute otherwise than the model's authors is refused, by the name of the
field. Attention dropout is ignored: none of these models was trained with it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from occ import json_files
from occ.models.config import DTYPES, ModelConfig, MoEConfig, MTPConfig, RopeScaling

EXTRA = "occ"
"""Key in config.json for what the published formats have no field for."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have in common.

    Attributes:
      architecture: the class in other libraries.
      qkv_bias: from config.json.
      qk_norm: likewise.
      attention_bias: the field may be True, for query, key and value alone.
      head_dim: where config.json says nothing; None is width / heads.
      rotary_fraction: likewise.
      concatenation: of the MTP modules' inputs.
    """

    architecture: str
    qkv_bias: Callable[[dict[str, Any]], bool]
    qk_norm: Callable[[dict[str, Any]], bool]
    attention_bias: bool = False
    head_dim: int | None = None
    rotary_fraction: float = 1.0
    concatenation: Any = "hidden_embedding"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", lambda raw: False, lambda raw: False),
    "qwen2": Family("Qwen2ForCausalLM", lambda raw: True, lambda raw: False, attention_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", lambda raw: False, lambda raw: True, head_dim=128),
    "mimo": Family("MiMoForCausalLM", lambda raw: True, lambda raw: False, attention_bias=True),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        lambda raw: _first(raw, "attention_bias", default=False),
        lambda raw: _first(raw, "use_qk_norm", default=False),
        attention_bias=True,
        rotary_fraction=0.5,
        concatenation="embedding_hidden",
    ),
}
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "use_mrope": (False, None),
    "rope_interleave": (False, None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1, None),
}
"""Values that these fields may have where they are given."""

RUNTIME = (
    "max_length",
    "param_dtype",
    "compute_dtype",
    "scan_layers",
    "remat",
    "attention",
    "attention_chunk",
    "decode_attention",
    "mtp",
    "lora",
)
"""Fields of `ModelConfig` in which two models of one architecture may differ."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
      ValueError: there is none, or it is no JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} holds no config.json: expected a folder of a published model.")
    return json_files.read_object(file)


def from_json(raw: dict[str, Any]) -> ModelConfig:
    """The architecture that config.json describes.

    Whether the MTP modules that it counts are stored is not known here.

    Raises:
      ValueError: a field is missing, or has a value that is not supported; it is named.
    """
    family = _family(raw)
    _check_supported(raw, family)
    heads, width = _integer(raw, "num_attention_heads"), _integer(raw, "hidden_size")
    head_dim = width // heads if family.head_dim is None else family.head_dim
    dtype = _first(raw, "torch_dtype", "dtype", default="float32")
    if dtype not in DTYPES:
        raise ValueError(f"torch_dtype must be one of {DTYPES}, got {dtype!r}.")
    base, fraction, scaling = _rope(raw, family)
    return ModelConfig(
        vocab_size=_integer(raw, "vocab_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        width=width,
        num_heads=heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", heads),
        head_dim=_integer(raw, "head_dim", head_dim),
        mlp_width=_integer(raw, "intermediate_size"),
        max_length=_integer(raw, "max_position_embeddings"),
        rope_base=base,
        rope_scaling=scaling,
        rotary_fraction=fraction,
        norm_epsilon=_number(raw, "rms_norm_eps"),
        qkv_bias=family.qkv_bias(raw),
        qk_norm=family.qk_norm(raw),
        tied_embeddings=_first(raw, "tie_word_embeddings", default=False),
        param_dtype=dtype,
        compute_dtype=dtype,
        moe=_moe(raw) if raw["model_type"] == "glm4_moe" else None,
        mtp=_mtp(raw, family),
    )


def to_json(config: ModelConfig, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json for a model.

    Args:
      config: the architecture.
      like: config.json of the folder that it came from, whose every other field is kept.

    Raises:
      ValueError: no published family has this architecture, or it is not that of `like`.
    """
    if like is None:
        raw = _fresh_json(config)
    else:
        raw = dict(like)
        now, before = architecture(config), architecture(from_json(like))
        changed = [name for name, value in before.items() if now[name] != value]
        if changed:
            raise ValueError(
                f"save: the model differs from the one of `like` in {', '.join(changed)}. Pass the "
                "folder that it was loaded from, or like=None."
            )
    count = "num_mtp_layers" if "num_mtp_layers" in raw else "num_nextn_predict_layers"
    if count in raw or config.mtp.num_modules:
        raw[count] = config.mtp.num_modules
    raw.pop(EXTRA, None)
    published, family = _published_mtp(config.mtp), _family(raw)
    if config.mtp.num_modules and published != _published_mtp(_mtp(raw, family)):
        raw[EXTRA] = {"mtp": published}
    return raw


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What is the same in every run of a model."""
    fields = dataclasses.asdict(config)
    if fields["moe"] is not None:
        fields["moe"].pop("capacity_factor")
    return {name: value for name, value in fields.items() if name not in RUNTIME}


def _family(raw: dict[str, Any]) -> Family:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} is not supported, expected one of "
            f"{tuple(FAMILIES)}. (Of DeepSeek-V3, whose attention is another, MTP modules and "
            "experts alone are shared with glm4_moe.)"
        )
    return FAMILIES[kind]


def _first(raw: dict[str, Any], *names: str, default: Any = None) -> Any:
    """The first of these fields that says something: null is as good as none."""
    found = (raw[name] for name in names if raw.get(name) is not None)
    return next(found, default)


def _field(raw: dict[str, Any], name: str, default: Any = None) -> Any:
    value = _first(raw, name, default=default)
    if value is None:
        raise ValueError(f"field {name!r} is missing. Is this the folder's own config.json?")
    return value


def _integer(raw: dict[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    value = _field(raw, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"field {name!r} must be a whole number from {least} on, got {value!r}.")
    return value


def _number(raw: dict[str, Any], name: str, default: float | None = None) -> float:
    value = _field(raw, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"field {name!r} must be a number, got {value!r}.")
    return float(value)


def _object(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    value = _first(raw, *names, default={})
    if not isinstance(value, dict):
        which = " or ".join(names)
        raise ValueError(f"field {which} must be an object of fields, got {value!r}.")
    return value


def _check_supported(raw: dict[str, Any], family: Family) -> None:
    required = dict(REQUIRED)
    if not family.attention_bias:
        required["attention_bias"] = (False, None)
    found = [
        f"{name} = {raw[name]!r} (supported: {', '.join(repr(value) for value in values)})"
        for name, values in required.items()
        if name in raw and raw[name] not in values
    ]
    kinds = sorted(set(map(str, raw.get("layer_types") or [])) - {"full_attention"})
    if kinds:
        found.append(f"layer_types with {', '.join(kinds)} (supported: 'full_attention')")
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise ValueError(f"a {raw['model_type']} model that we do not have:{lines}")


def _rope(raw: dict[str, Any], family: Family) -> tuple[float, float, RopeScaling | None]:
    """Base, rotated fraction, and scaling; of newer files in one field, of older ones in three."""
    given = _object(raw, "rope_parameters", "rope_scaling")
    base = _number(given, "rope_theta", _number(raw, "rope_theta", 10_000.0))
    default = _number(raw, "partial_rotary_factor", family.rotary_fraction)
    fraction = _number(given, "partial_rotary_factor", default)
    if family.rotary_fraction == 1.0 and fraction != 1.0:
        raise ValueError(f"partial_rotary_factor = {fraction} is not supported here.")
    kind = _first(given, "rope_type", "type", default="default")
    if kind == "default":
        return base, fraction, None
    if kind == "linear":
        return base, fraction, RopeScaling("linear", _number(given, "factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            _number(given, "factor"),
            _number(given, "low_freq_factor"),
            _number(given, "high_freq_factor"),
            _integer(given, "original_max_position_embeddings"),
        )
        return base, fraction, scaling
    raise ValueError(
        f"rope_scaling of type {kind!r} is not supported, expected 'linear' or "
        "'llama3'. Where the context before scaling is long enough, take the field out."
    )


def _moe(raw: dict[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=_integer(raw, "n_routed_experts"),
        experts_per_token=_integer(raw, "num_experts_per_tok"),
        expert_width=_integer(raw, "moe_intermediate_size"),
        num_shared_experts=_integer(raw, "n_shared_experts", 0, least=0),
        first_dense_layers=_integer(raw, "first_k_dense_replace", least=0),
        routed_scaling=_number(raw, "routed_scaling_factor"),
        normalise_top_k=_field(raw, "norm_topk_prob"),
        num_groups=_integer(raw, "n_group"),
        top_groups=_integer(raw, "topk_group"),
    )


def _mtp(raw: dict[str, Any], family: Family) -> MTPConfig:
    """The modules as serving code computes them, or as this code wrote them down.

    vLLM, SGLang and transformers all take the trunk's hidden state after its final norm. They do
    not agree on the embedding at position 0, which vLLM (and SGLang for MiMo alone) sets to zero.
    """
    count = _integer(raw, "num_mtp_layers", 0, least=0)
    count = _integer(raw, "num_nextn_predict_layers", count, least=0)
    fields = {"hidden_after_final_norm": True, "concatenation": family.concatenation}
    own = _object(_object(raw, EXTRA), "mtp")
    unknown = sorted(own.keys() - {field.name for field in dataclasses.fields(MTPConfig)})
    if unknown:
        raise ValueError(f"field {EXTRA!r} has entries that no MTP module has: {unknown}.")
    return MTPConfig(num_modules=count, **(fields | own))


def _published_mtp(mtp: MTPConfig) -> dict[str, Any]:
    """The fields that tensors do not tell."""
    fields = dataclasses.asdict(mtp)
    return {
        name: value
        for name, value in fields.items()
        if name not in ("num_modules", "own_embedding", "own_output_head")
    }


def _fresh_json(config: ModelConfig) -> dict[str, Any]:
    kind = _model_type(config)
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": config.param_dtype,
    }
    scaling = config.rope_scaling
    if scaling is not None:
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        raw["rope_scaling"] |= {
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }
    if kind in ("llama", "qwen3", "glm4_moe"):
        raw["attention_bias"] = config.qkv_bias
    if config.moe is None:
        return raw
    return raw | {
        "partial_rotary_factor": config.rotary_fraction,
        "use_qk_norm": config.qk_norm,
        "n_routed_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        "moe_intermediate_size": config.moe.expert_width,
        "n_shared_experts": config.moe.num_shared_experts,
        "first_k_dense_replace": config.moe.first_dense_layers,
        "routed_scaling_factor": config.moe.routed_scaling,
        "norm_topk_prob": config.moe.normalise_top_k,
        "n_group": config.moe.num_groups,
        "topk_group": config.moe.top_groups,
        "num_nextn_predict_layers": config.mtp.num_modules,
    }


def _model_type(config: ModelConfig) -> str:
    if config.moe is not None:
        return "glm4_moe"
    problem = None
    if config.rotary_fraction != 1.0:
        problem = f"rotary_fraction={config.rotary_fraction}"
    if config.qkv_bias and config.qk_norm:
        problem = "both qkv_bias and qk_norm"
    if problem is not None:
        raise ValueError(
            f"save: no published family of dense models has {problem}, so other tools could not "
            "load it. Keep Orbax checkpoints of it instead."
        )
    if config.qkv_bias:
        return "mimo" if config.mtp.num_modules else "qwen2"
    return "qwen3" if config.qk_norm else "llama"
