"""Generation in portions of rows whose prompts are about equally long.

Left-padded, every prompt is as wide as the widest, and a portion decodes until its last response
has ended. Sorted by length of prompt (nothing else is known beforehand) and cut into portions, most
prompts need fewer columns, and short responses wait for fewer others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from occ.generation.sampling import Generation, Work
from occ.models.policy import Policy

COLUMN_RUNGS = 4


class Portion(NamedTuple):
    """Rows that are generated together.

    Attributes:
      rows: int32 [R], their places in the batch; the last stands several times where rows are
        wanting.
      columns: of their prompts.
    """

    rows: np.ndarray
    columns: int


def portions(prompt_lengths: np.ndarray, columns: int, rows_at_a_time: int) -> list[Portion]:
    """Cuts a batch into portions of equally many rows, in order of length of prompt.

    Their columns come from a ladder of `COLUMN_RUNGS` at most, up to those of the batch: that is
    how many programs are compiled for it, whatever lengths it has.

    Args:
      prompt_lengths: int [B], tokens.
      columns: of the batch's prompts.
      rows_at_a_time: R; 0 makes a single portion of the batch as it is.

    >>> [(p.rows.tolist(), p.columns) for p in portions(np.array([7, 2, 5]), 8, 2)]
    [([1, 2], 6), ([0, 0], 8)]
    """
    batch = len(prompt_lengths)
    if not rows_at_a_time:
        return [Portion(np.arange(batch, dtype=np.int32), columns)]
    size = min(rows_at_a_time, batch)
    step = -(-columns // COLUMN_RUNGS)
    order = np.argsort(prompt_lengths, kind="stable").astype(np.int32)
    found = []
    for start in range(0, batch, size):
        rows = order[start : start + size]
        needed = -(-int(prompt_lengths[rows[-1]]) // step) * step
        rows = np.pad(rows, (0, size - len(rows)), mode="edge")
        found.append(Portion(rows, min(needed, columns)))
    return found


@dataclasses.dataclass(frozen=True)
class Bucketed:
    """`generate`, a portion at a time: the same tokens, with their log-probs but for rounding.

    A row's random numbers depend on its place in the whole batch, and so not on the portions.

    Attributes:
      program: jitted `(policy, prompts, prompt_mask, key, rows=...) -> Generation`.
      rows_at_a_time: R; 0 runs the program once, on the batch as it is.
      pad_token: stands on the left of prompts.
      fetch: whole values of arrays, on the host; several processes need one that gathers.
    """

    program: Callable[..., Generation]
    rows_at_a_time: int
    pad_token: int
    fetch: Callable[[Any], Any] = jax.device_get

    def __post_init__(self):
        if self.rows_at_a_time < 0:
            raise ValueError(
                "Bucketed: expected rows_at_a_time >= 0, where 0 is all rows at once, got "
                f"{self.rows_at_a_time}. It comes from LayoutConfig.generation_rows."
            )

    def __call__(self, policy: Policy, prompts: Any, prompt_mask: Any, key: jax.Array) -> Any:
        """One response to each prompt, in the order and the columns of the prompts.

        Args:
          policy: the model.
          prompts: int32 [B, P], left-padded.
          prompt_mask: bool [B, P], False on padding.
          key: PRNG key.

        Returns:
          A `Generation` of numpy arrays.
        """
        if not self.rows_at_a_time:
            return self.fetch(self.program(policy, prompts, prompt_mask, key))
        prompts, prompt_mask = np.asarray(prompts), np.asarray(prompt_mask)
        columns = prompts.shape[1]
        cut = portions(prompt_mask.sum(axis=1), columns, self.rows_at_a_time)
        generated = self.fetch(
            [
                self.program(
                    policy,
                    prompts[portion.rows, columns - portion.columns :],
                    prompt_mask[portion.rows, columns - portion.columns :],
                    key,
                    rows=portion.rows,
                )
                for portion in cut
            ]
        )
        widened = [
            self._widen(generation, columns - portion.columns)
            for generation, portion in zip(generated, cut, strict=True)
        ]
        # The first of every row, in their order: rows that only filled up a portion fall away.
        _, order = np.unique(np.concatenate([portion.rows for portion in cut]), return_index=True)
        whole: list[Any] = [np.concatenate(values)[order] for values in zip(*widened, strict=True)]
        work = [generation.work for generation in generated]
        return Generation(*whole, work=Work(*(sum(values) for values in zip(*work, strict=True))))

    def _widen(self, generation: Any, columns: int) -> list[np.ndarray]:
        """The fields of a portion, with so many columns of padding on the left of its prompts."""

        def widen(name, value):
            if value.ndim == 1:
                return value
            padding = self.pad_token if name == "tokens" else 0
            return np.pad(value, ((0, 0), (columns, 0)), constant_values=padding)

        return [widen(n, value) for n, value in generation._asdict().items() if n != "work"]


def padding_waste(prompt_mask: Any, lengths: Any, rows_at_a_time: int) -> float:
    """Share of the token positions that generation computed and that hold no token.

    A portion computes its rows times its prompts' columns, and then its rows once for each token of
    its longest response: rows that have ended go along until the last one has.

    Args:
      prompt_mask: bool [B, P], False on padding.
      lengths: int [B], tokens of the responses.
      rows_at_a_time: R, as of `Bucketed`.
    """
    prompt_lengths, lengths = np.asarray(prompt_mask).sum(axis=1), np.asarray(lengths)
    computed = sum(
        portion.rows.size * (portion.columns + int(lengths[portion.rows].max()))
        for portion in portions(prompt_lengths, prompt_mask.shape[1], rows_at_a_time)
    )
    return float(1 - (prompt_lengths.sum() + lengths.sum()) / computed)
