"""Which engine samples a run's responses, and how it is started."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from occ.checks import validate

RESERVED = (
    "model",
    "dtype",
    "max_model_len",
    "speculative_config",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "enable_sleep_mode",
    "enforce_eager",
    "worker_extension_cls",
    "load_format",
    "logprobs_mode",
    "skip_tokenizer_init",
    "enable_return_routed_experts",
)
"""Arguments of `vllm.LLM` that other fields stand for, or that the hand-over of weights needs."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The rollout engine, and where it runs.

    Attributes:
      kind: "in_process", the samplers of this process; or "vllm", in a process of its own.
      python: interpreter of the environment that has vLLM; None is this one's.
      address: of a server that somebody else started ("unix:PATH" or "HOST:PORT"), on a host that
        sees `folder` too; None starts one.
      folder: where weights are handed over: memory that hosts share, or a disk. None is /dev/shm,
        or the place of temporary files where there is none.
      dtype: that it computes in; "auto" is the run's `model.compute_dtype`.
      draft_depth: tokens that the model's own MTP modules draft there for each pass of the trunk;
        0 is none. vLLM drafts for MiMo and GLM-4.5.
      cache_gib: memory for keys and values, GiB; None leaves it to vLLM.
      memory_share: of the device that it takes in all, where both share one; None likewise. Give
        JAX the rest (XLA_PYTHON_CLIENT_MEM_FRACTION).
      eager: no compilation there: it starts in seconds, and each pass takes a little longer.
      tensor: devices that a copy of the model is cut over.
      overlap: rollout n + 1 is sampled while the run trains on rollout n, from the policy before
        that: one step off-policy. The in-process engine samples it before, and gains nothing.
      sleep: it frees the device while the run trains (vLLM's sleep mode, GPUs alone).
      importance_cap: of the truncated importance weights old / rollout policy, where
        `objective.importance_cap` says nothing; None is off. It is on for engines in processes of
        their own, which round otherwise than training does, and with `overlap`.
      largest_mismatch: nats; a mean |log-prob there - log-prob here| above it ends the run. It is
        looked at where top_p and top_k leave the distribution whole.
      start_seconds, request_seconds: the longest that a start and a request may take.
      silence_seconds: without a sign of life, after which it is taken for dead.
      options: further arguments of `vllm.LLM`.
    """

    kind: Literal["in_process", "vllm"] = "in_process"
    python: str | None = None
    address: str | None = None
    folder: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    draft_depth: int = 0
    cache_gib: float | None = None
    memory_share: float | None = None
    eager: bool = False
    tensor: int = 1
    overlap: bool = False
    sleep: bool = False
    importance_cap: float | None = 2.0
    largest_mismatch: float = 0.3
    start_seconds: float = 600.0
    request_seconds: float = 3600.0
    silence_seconds: float = 60.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        validate(self)
        taken = sorted(set(self.options) & set(RESERVED))
        if taken:
            raise ValueError(
                f"EngineConfig.options: {taken} are set by the run or by other fields of "
                f"EngineConfig. Leave them out; these are: {RESERVED}."
            )
        if self.overlap and self.sleep:
            raise ValueError(
                "EngineConfig: overlap samples while the run trains, and sleep frees the device "
                "for that time. Choose one of them."
            )
        if self.address is not None and self.python is not None:
            raise ValueError(
                "EngineConfig: python starts a server, and address attaches to one that runs. "
                f"Give one of them, got {self.python!r} and {self.address!r}."
            )

    @property
    def external(self) -> bool:
        """Whether it is a process of its own."""
        return self.kind != "in_process"
