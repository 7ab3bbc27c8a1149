"""What a rollout engine is: weights in; prompts, sampling and a key in; responses out."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from occ.generation.sampling import Generation, SamplingConfig
from occ.models.policy import Policy


class EngineError(RuntimeError):
    """An engine died, hung, refused or answered what is no answer; the message says what to do."""


class StaleWeightsError(EngineError):
    """An engine holds other weights than those whose samples are asked for."""


class MismatchError(EngineError):
    """The engine's log-probs are not those of the policy that is trained."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts, and how they are to be answered.

    Attributes:
      prompts: int32 [N, P], left-padded.
      prompt_mask: bool [N, P], False on padding.
      sampling: temperature, nucleus, length, stop tokens.
      key: PRNG key. What is sampled depends on it, and not on what was asked before.
      samples: G, responses a prompt.
    """

    prompts: np.ndarray
    prompt_mask: np.ndarray
    sampling: SamplingConfig
    key: jax.Array
    samples: int = 1

    def seeds(self) -> np.ndarray:
        """int64 [N G], a seed a response, for engines that know no keys of JAX."""
        words = np.asarray(jax.random.key_data(self.key), np.uint32).ravel()
        rows = np.random.SeedSequence(words.tolist()).generate_state(self.rows, np.uint64)
        return (rows >> np.uint64(1)).astype(np.int64)

    @property
    def rows(self) -> int:
        """N G."""
        return len(self.prompts) * self.samples


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples responses of a policy whose weights it was given.

    A new one needs these methods, and passes `tests/test_engines.py`.
    """

    def update_weights(self, policy: Policy) -> None:
        """Takes the weights that `generate` is to sample with; those it has cost nothing.

        Raises:
          StaleWeightsError: it does not hold them afterwards.
          EngineError: it could not be told.
        """

    def generate(self, request: Request) -> Generation:
        """Responses with the weights of the last `update_weights`.

        Returns:
          A `Generation` of numpy arrays, of N x G rows, the samples of a prompt together.

        Raises:
          StaleWeightsError: it holds other weights.
          EngineError: it gave no answer.
        """

    def rest(self) -> None:
        """Frees the device, if it can, until it is used again; a run calls it before it trains."""

    def metrics(self) -> dict[str, Any]:
        """What the last update of weights and the last `generate` took, for a row of metrics."""

    def close(self) -> None:
        """Ends what was started for it. A closed engine starts again when it is used."""
