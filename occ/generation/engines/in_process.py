"""The engine of this process: compiled samplers on the run's own mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

from occ.generation.engines.protocol import Request
from occ.generation.sampler import Sampler
from occ.generation.sampling import Generation
from occ.models.policy import Policy


@dataclasses.dataclass
class InProcessEngine:
    """Samples with the very arrays that are trained, so that weights are never stale.

    Attributes:
      samplers: compiled, each for its own `Sampler.sampling`.
      policy: as given last.
    """

    samplers: tuple[Sampler, ...]
    policy: Policy | None = None

    def update_weights(self, policy: Policy) -> None:
        """Keeps it; nothing is copied."""
        self.policy = policy

    def generate(self, request: Request) -> Generation:
        """As `RolloutEngine.generate`.

        Raises:
          ValueError: no weights were given, or nothing was compiled for this sampling.
        """
        if self.policy is None:
            raise ValueError("InProcessEngine.generate: call update_weights first.")
        sampler = self._sampler(request)
        return sampler(
            self.policy, request.prompts, request.prompt_mask, request.key, request.samples
        )

    def _sampler(self, request: Request) -> Sampler:
        # The very one that it came from, where two are for equal settings.
        for same in (lambda one: one.sampling is request.sampling, lambda one: True):
            for sampler in self.samplers:
                if sampler.sampling == request.sampling and same(sampler):
                    return sampler
        raise ValueError(
            f"InProcessEngine.generate: nothing was compiled for {request.sampling}, expected one "
            f"of {[sampler.sampling for sampler in self.samplers]}."
        )

    def rest(self) -> None:
        """It holds nothing of its own."""

    def metrics(self) -> dict[str, Any]:
        """None: weights take no way."""
        return {}

    def close(self) -> None:
        """Nothing was started."""
