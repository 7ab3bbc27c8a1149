"""Portions of rows whose prompts are about equally long.

Left-padded, every prompt is as wide as the widest. Sorted by length and cut into portions, most
prompts need fewer columns; and what was killed goes on after the last portion.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from occ.generation.sampler import COLUMN_RUNGS


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
      rows_at_a_time: R.

    >>> [(p.rows.tolist(), p.columns) for p in portions(np.array([7, 2, 5]), 8, 2)]
    [([1, 2], 6), ([0, 0], 8)]
    """
    batch = len(prompt_lengths)
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
