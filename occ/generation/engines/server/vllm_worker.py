"""What each of vLLM's workers does with a folder of weights: takes them in, and says what it holds.

vLLM mixes this class into its own worker (`worker_extension_cls`). It imports torch and vLLM, and
nothing of this project.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.model_loader.reload.inplace import reload_weights

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Published matrices that vLLM keeps as one, in this order."""

PROBES = 4
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Norm-wise, of a product with the weights: rounding of vLLM's kernels, and no more."""


class WeightReceiver:
    """Methods that vLLM's worker gets beside its own."""

    model_runner: Any
    vllm_config: Any

    def receive_weights(self, folder: str) -> dict[str, Any]:
        """Puts the tensors of a folder into the model, and into the one that drafts, if any.

        Returns:
          "wrong": names of modules that do not hold what the folder does.
          "exact", "product", "unseen": parameters that were compared bit for bit; through products
          with random vectors, where the kernels keep a packed form alone; and that no comparison
          reached.
          "left_out": names of tensors that neither model has a place for.
        """
        files = _Files(pathlib.Path(folder))
        models = [(self.model_runner.get_model(), self.vllm_config)]
        drafter = getattr(getattr(self.model_runner, "drafter", None), "model", None)
        if drafter is not None:
            models.append((drafter, self.vllm_config))
        names = [_names_for(model, files.names, which) for which, (model, _) in enumerate(models)]
        for (model, config), wanted in zip(models, names, strict=True):
            reload_weights(config, model, files.tensors(wanted), None, True)
        _tie(models[0][0])
        found = {"wrong": [], "exact": 0, "product": 0}
        seen: set[str] = set()
        with torch.inference_mode():
            for model, _ in models:
                _compare(model, files, found, seen)
        taken = set().union(*names)
        found["unseen"] = sum(files.size(name) for name in taken - seen)
        found["left_out"] = sorted(set(files.names) - taken)
        return found


def _tie(model: torch.nn.Module) -> None:
    """Hands the embedding to a tied output head, whose packed form is left stale on CPUs."""
    if getattr(model.config, "tie_word_embeddings", False):
        model.lm_head.weight = model.model.embed_tokens.weight
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class _Files:
    """Tensors of all files of a folder, by name."""

    def __init__(self, folder: pathlib.Path):
        self._open: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            handle = safe_open(file, framework="pt")
            self._open |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> list[str]:
        return list(self._open)

    def size(self, name: str) -> int:
        return int(torch.Size(self._open[name].get_slice(name).get_shape()).numel())

    def tensor(self, name: str) -> torch.Tensor:
        return self._open[name].get_tensor(name)

    def tensors(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, self.tensor(name)


def _names_for(model: torch.nn.Module, names: list[str], which: int) -> list[str]:
    """Those that go into a model: all but others' MTP modules, or those and what they share."""
    if which == 1:
        return names  # load_weights of MTP models chooses by itself
    layers = model.config.num_hidden_layers
    return [name for name in names if not _of_module(name, layers)]


def _of_module(name: str, layers: int) -> bool:
    if "mtp_layers." in name:
        return True
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found.group(1)) >= layers


def _published(name: str, layers: int) -> str:
    """Published name of a module's tensor, of the name that vLLM gives it."""
    name = name.replace(".mtp_block.", ".")

    def counted(found: re.Match[str]) -> str:
        return f"mtp_layers.{int(found.group(1)) - layers}."

    return re.sub(r"mtp_layers\.(\d+)\.", counted, name)


def _compare(model: torch.nn.Module, files: _Files, found: dict[str, Any], seen: set[str]) -> None:
    """Compares every weight and bias of a model with the folder's."""
    layers = model.config.num_hidden_layers
    names = set(files.names)
    for place, module in model.named_modules():
        for kind in ("weight", "bias", "e_score_correction_bias"):
            held = getattr(module, kind, None)
            if not isinstance(held, torch.Tensor):
                continue
            parts = _parts(_published(f"{place}.{kind}", layers), names)
            if not parts:
                continue
            expected = torch.cat([files.tensor(part) for part in parts])
            how, right = _holds(module, kind, held, expected)
            if how is None:
                continue
            if not right:
                found["wrong"].append(f"{place}.{kind}")
            found[how] += expected.numel() if not seen.issuperset(parts) else 0
            seen.update(parts)


def _parts(name: str, names: set[str]) -> list[str]:
    """Published tensors that make up one of vLLM's; none where they are not in the folder."""
    parts = [name]
    for fused, pieces in FUSED.items():
        if f".{fused}." in name:
            parts = [name.replace(f".{fused}.", f".{piece}.") for piece in pieces]
    if name == "lm_head.weight" and name not in names:
        parts = ["model.embed_tokens.weight"]  # tied
    return parts if names.issuperset(parts) else []


def _holds(
    module: torch.nn.Module, kind: str, held: torch.Tensor, expected: torch.Tensor
) -> tuple[str | None, bool]:
    """How a parameter was compared, and whether it is what it should be."""
    exact = held.shape[1:] == expected.shape[1:] and held.shape[0] >= expected.shape[0] > 0
    right = True
    if exact:  # the rows of a vocabulary may be padded
        rows = held[: expected.shape[0]]
        right = torch.equal(rows, expected.to(held.dtype).to(held.device))
    packed = getattr(module, "cpu_linear", None)
    if kind == "weight" and packed is not None and expected.ndim == 2:
        vectors = torch.randn(
            PROBES, expected.shape[1], generator=torch.Generator().manual_seed(0)
        ).to(held.dtype)
        got = packed(vectors, held, None).float()[:, : expected.shape[0]]
        wanted = torch.nn.functional.linear(vectors.float(), expected.to(held.dtype).float())
        error = torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted)
        right &= bool(error <= TOLERANCE[held.dtype])
        return "exact" if exact else "product", right
    return ("exact", right) if exact else (None, True)
