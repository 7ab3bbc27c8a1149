"""A compiled `generate` as the host calls it: prompts and a number of samples in, arrays out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from occ.generation.sampling import Generation, SamplingConfig, Work
from occ.models.policy import Policy

COLUMN_RUNGS = 4


def needed_columns(prompt_mask: np.ndarray) -> int:
    """Columns that the longest prompt takes, of a ladder of `COLUMN_RUNGS` up to all.

    So many programs are compiled at most, whatever lengths prompts have.

    >>> needed_columns(np.array([[False] * 6 + [True] * 2, [False] * 5 + [True] * 3]))
    4
    """
    columns = prompt_mask.shape[1]
    step = -(-columns // COLUMN_RUNGS)
    longest = int(prompt_mask.sum(axis=1).max())
    return min(-(-longest // step) * step, columns)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples of prompts, on the host.

    Attributes:
      program: jitted `(policy, prompts, prompt_mask, key, prompt_of=..., draft_depth=...) ->
        Generation`.
      narrow: leave out columns in which no prompt has a token, for a program each.
      pad_token: stands on the left of prompts.
      draft_depth: tokens that the MTP modules draft for each pass of the trunk.
      fetch: whole values of arrays, on the host; several processes need one that gathers.
      sampling: that the program was compiled for; engines find it by that.
    """

    program: Callable[..., Generation]
    narrow: bool
    pad_token: int
    draft_depth: int = 0
    fetch: Callable[[Any], Any] = jax.device_get
    sampling: SamplingConfig | None = None

    def __call__(
        self, policy: Policy, prompts: Any, prompt_mask: Any, key: jax.Array, samples: int = 1
    ) -> Any:
        """Some responses to each prompt, the samples of a prompt together.

        Args:
          policy: the model.
          prompts: int32 [N, P], left-padded.
          prompt_mask: bool [N, P], False on padding.
          key: PRNG key.
          samples: G of each prompt.

        Returns:
          A `Generation` of numpy arrays, of N x G rows and as many columns as the prompts have.
        """
        prompts, prompt_mask = np.asarray(prompts), np.asarray(prompt_mask)
        prompt_of = np.repeat(np.arange(len(prompts), dtype=np.int32), samples)
        columns = prompts.shape[1]
        left_out = columns - needed_columns(prompt_mask) if self.narrow else 0
        inputs = prompts[:, left_out:], prompt_mask[:, left_out:], key
        generation = self.fetch(
            self.program(policy, *inputs, prompt_of=prompt_of, draft_depth=self.draft_depth)
        )

        def widen(values, padding=0):
            before = [(0, 0)] * (values.ndim - 1) + [(left_out, 0)]
            return np.pad(values, before, constant_values=padding)

        return generation._replace(
            tokens=widen(generation.tokens, self.pad_token),
            response_mask=widen(generation.response_mask),
            log_prob=widen(generation.log_prob),
            experts=None if generation.experts is None else widen(generation.experts, -1),
        )


def padding_waste(prompt_mask: Any, work: Work) -> float:
    """Share of the places of tokens in generation that hold none.

    Padding of prompts, and slots whose row has ended while others went on.

    Args:
      prompt_mask: bool [N, P], False on padding.
      work: of the generation.
    """
    held = int(np.asarray(prompt_mask).sum()) + int(work.passes)
    return 1 - held / int(work.places)
