"""What all programs compute: a small Llama-style policy and one minibatch, as numpy arrays.

Numpy alone, so that it can be read in every environment.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
CLIP_NORM = 1.0
LEARNING_RATE = 1e-6  # small, so that no step changes what the next ones compute
NORM_EPSILON = 1e-6
ROPE_BASE = 1_000_000  # Tunix's Llama rotates at this base, whatever its configuration says
PAD = 0  # a token that does not occur


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model and of the minibatch.

    Attributes:
      vocab, layers, width: V, L and D of the decoder; its output head is the embedding.
      head_dim: of each of the D / head_dim heads, keys and values included.
      mlp_width: F, of the SwiGLU MLP.
      rows, length: B sequences of T tokens, whose second half is the response.
    """

    vocab: int = 2048
    layers: int = 4
    width: int = 256
    head_dim: int = 64
    mlp_width: int = 1024
    rows: int = 16
    length: int = 256

    def __post_init__(self):
        if self.width % self.head_dim or self.length % 2:
            raise ValueError(
                "Sizes: expected a width that is a multiple of head_dim and an even length, got "
                f"{self.width}, {self.head_dim} and {self.length}."
            )

    @property
    def heads(self) -> int:
        """Of queries, keys and values alike."""
        return self.width // self.head_dim

    @property
    def response(self) -> int:
        """Tokens of a response, T / 2."""
        return self.length // 2

    @property
    def tokens(self) -> int:
        """Of the minibatch, prompts included: B T."""
        return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step's inputs.

    Attributes:
      sizes: of everything.
      weights: float32; "embedding" [V, D] and "final_norm" [D]; by layer "attention_norm" and
        "mlp_norm" [L, D], "query", "key", "value" and "output" [L, D, D], "gate" and "up"
        [L, D, F], "down" [L, F, D]. Matrices multiply from the right.
      tokens: int32 [B, T], none of them `PAD`.
      advantages: float32 [B], of each response.
      old_log_prob: float32 [B, T / 2], of the response's tokens.
    """

    sizes: Sizes
    weights: dict[str, np.ndarray]
    tokens: np.ndarray
    advantages: np.ndarray
    old_log_prob: np.ndarray

    def save(self, file: pathlib.Path) -> None:
        """Writes all of it to one .npz file."""
        sizes = {f"sizes/{name}": value for name, value in dataclasses.asdict(self.sizes).items()}
        weights = {f"weights/{name}": value for name, value in self.weights.items()}
        batch = {name: getattr(self, name) for name in ("tokens", "advantages", "old_log_prob")}
        arrays: dict[str, Any] = {**sizes, **weights, **batch}  # savez's own options are bools
        np.savez(file, **arrays)


def load(file: pathlib.Path) -> Workload:
    """The inverse of `Workload.save`."""
    with np.load(file) as arrays:

        def group(name):
            return {key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{name}/")}

        sizes = Sizes(**{name: int(value) for name, value in group("sizes").items()})
        batch = {name: arrays[name] for name in ("tokens", "advantages", "old_log_prob")}
        return Workload(sizes, group("weights"), **batch)


def draw(sizes: Sizes, seed: int = 0) -> Workload:
    """Random weights and tokens; the old log-probs are those of a uniform policy for now."""
    rng = np.random.default_rng(seed)
    layers, width, mlp = sizes.layers, sizes.width, sizes.mlp_width

    def matrix(*shape):
        return rng.normal(0, shape[-2] ** -0.5, shape).astype(np.float32)

    def scale(*shape):
        return rng.normal(1, 0.1, shape).astype(np.float32)  # unlike, so that none can be confused

    weights = {
        "embedding": matrix(width, sizes.vocab).T.copy(),
        "final_norm": scale(width),
        "attention_norm": scale(layers, width),
        "mlp_norm": scale(layers, width),
        **{name: matrix(layers, width, width) for name in ("query", "key", "value", "output")},
        **{name: matrix(layers, width, mlp) for name in ("gate", "up")},
        "down": matrix(layers, mlp, width),
    }
    shape = (sizes.rows, sizes.response)
    return Workload(
        sizes,
        weights,
        tokens=rng.integers(PAD + 1, sizes.vocab, (sizes.rows, sizes.length), dtype=np.int32),
        advantages=rng.normal(0.5, 1, sizes.rows).astype(np.float32),
        old_log_prob=np.full(shape, -np.log(sizes.vocab), np.float32),
    )


def off_policy(workload: Workload, log_prob: np.ndarray, seed: int = 1) -> Workload:
    """The same minibatch, sampled from a policy near the one with these log-probs [B, T / 2].

    Ratios spread around 1 by a fifth, so that both sides of the clip are reached.
    """
    noise = np.random.default_rng(seed).normal(0, 0.2, log_prob.shape)
    return dataclasses.replace(workload, old_log_prob=(log_prob + noise).astype(np.float32))
