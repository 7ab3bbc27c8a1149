"""Several sequences in one row of a minibatch, so that little is computed on padding.

Rows are filled by first fit, the longest sequences first. Packing changes no loss, no c and v^2 and
no gradient but for rounding: tokens see their own sequence alone, and every sum runs over tokens or
sequences, never over rows.

Shapes stay few. All minibatches of a rollout get the same number of rows, which is taken from a
ladder of `RUNGS` at most, and rows keep their columns: a run compiles its train step at most once a
rung, whatever lengths it meets. More rungs would leave less padding and compile more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from occ.training.batch import Minibatch, split, take_rows
from occ.training.config import TrainConfig

RUNGS = 8


def minibatches(batch: Minibatch, config: TrainConfig) -> list[Minibatch]:
    """A rollout cut into its minibatches, in order, packed if the layout says so.

    Sequences without a token that counts (of a dropped group, or invalid) are left out of packed
    minibatches, since no loss sees them; except from a mixture of experts, whose router's load is
    that of all tokens.

    Measures that look at leading rows (halves of the minibatch, or a subset) find the same
    sequences in them as without packing.

    Args:
      batch: the rollout, B rows.
      config: of the run: number of minibatches, layout and measure.

    Returns:
      Packed, they are numpy arrays of T columns, and all have the same number of rows, at most
      that of a padded minibatch.

    Raises:
      ValueError: the rollout cannot be divided evenly, or no number of rows suits the layout.
    """
    count, layout = config.rollout.minibatches, config.layout
    if not layout.pack:
        return split(batch, count)
    parts = split(jax.device_get(batch), count)
    padded, length = parts[0].tokens.shape
    border = config.mtp.leading_rows(padded)
    portions = [
        (take_rows(part, slice(0, border)), take_rows(part, slice(border, padded)))
        for part in parts
    ]
    options: dict[str, Any] = {
        "length": length,
        "sequences_per_row": layout.sequences_per_row,
        "keep_uncounted": config.model.moe is not None,
    }
    needed = np.array([[rows_needed(portion, **options) for portion in pair] for pair in portions])
    rungs = row_ladder(padded, _divisor(config))
    for rows in rungs:
        border = config.mtp.leading_rows(rows)
        sizes = (border, rows - border)
        if np.all(needed <= sizes):
            break
    return [
        _stack([pack(p, rows=n, **options) for p, n in zip(pair, sizes, strict=True)])
        for pair in portions
    ]


def pack(
    minibatch: Minibatch,
    *,
    length: int,
    sequences_per_row: int,
    rows: int,
    keep_uncounted: bool = False,
) -> Minibatch:
    """Moves every sequence to a row that has room for it; on the host.

    Tokens keep their positions and everything else that is said of them. The result depends on the
    minibatch alone: of two sequences of equal length the earlier is placed first.

    Args:
      minibatch: B rows, one sequence or several in each.
      length: columns of the packed rows.
      sequences_per_row: S, the most sequences in a row; they are numbered 1..S.
      rows: of the result; those that are not needed hold padding alone.
      keep_uncounted: keep sequences without any token that counts.

    Returns:
      numpy arrays [rows, length], with zeros on padding.

    Raises:
      ValueError: the sequences take more rows, or one of them more columns.
    """
    fields = {
        name: np.asarray(value) for name, value in vars(minibatch).items() if value is not None
    }
    sequences = _sequences(minibatch, keep_uncounted)
    filled = first_fit(
        [columns.size for _, columns in sequences],
        length=length,
        sequences_per_row=sequences_per_row,
    )
    if len(filled) > rows:
        raise ValueError(
            f"pack: {len(sequences)} sequences take {len(filled)} rows of {length} columns with at "
            f"most {sequences_per_row} in each, got rows={rows}. Give as many as `rows_needed`."
        )
    packed = {
        name: np.zeros((*value.shape[:-2], rows, length), value.dtype)
        for name, value in fields.items()
    }
    for row, members in enumerate(filled):
        start = 0
        for number, member in enumerate(members, start=1):
            source, columns = sequences[member]
            target = slice(start, start + columns.size)
            for name, value in fields.items():
                packed[name][..., row, target] = value[..., source, columns]
            packed["segment_ids"][row, target] = number
            start += columns.size
    return minibatch.replace(**packed)


def rows_needed(
    minibatch: Minibatch, *, length: int, sequences_per_row: int, keep_uncounted: bool = False
) -> int:
    """The fewest rows that `pack` takes with these arguments."""
    lengths = [columns.size for _, columns in _sequences(minibatch, keep_uncounted)]
    return len(first_fit(lengths, length=length, sequences_per_row=sequences_per_row))


def first_fit(lengths: Sequence[int], *, length: int, sequences_per_row: int) -> list[list[int]]:
    """Sequences of every row, by first fit in decreasing length.

    Args:
      lengths: tokens of each sequence.
      length: tokens that a row holds.
      sequences_per_row: the most sequences that a row holds.

    Returns:
      Indices into `lengths`, row by row.

    Raises:
      ValueError: a sequence is longer than a row.

    >>> first_fit([2, 5, 3, 4], length=7, sequences_per_row=2)
    [[1, 0], [3, 2]]
    """
    filled: list[list[int]] = []
    free: list[int] = []
    for index in np.argsort(-np.asarray(lengths, int), kind="stable").tolist():
        needed = lengths[index]
        if needed > length:
            raise ValueError(
                f"first_fit: sequence {index} has {needed} tokens, and a row holds {length}. Make "
                "rows at least as long as the longest sequence."
            )
        for row, members in enumerate(filled):
            if free[row] >= needed and len(members) < sequences_per_row:
                members.append(index)
                free[row] -= needed
                break
        else:
            filled.append([index])
            free.append(length - needed)
    return filled


def row_ladder(rows: int, divisor: int) -> tuple[int, ...]:
    """Numbers of rows that packed minibatches may have: `RUNGS` at most, in equal steps.

    Args:
      rows: of a padded minibatch; the last rung, on which everything fits.
      divisor: what every rung must be a multiple of.

    Raises:
      ValueError: `rows` is no multiple of the divisor.

    >>> row_ladder(64, 4), row_ladder(10, 1)
    ((8, 16, 24, 32, 40, 48, 56, 64), (2, 4, 6, 8, 10))
    """
    if rows % divisor:
        raise ValueError(
            f"row_ladder: minibatches of {rows} sequences cannot be cut into {divisor} equal "
            "parts, which is LayoutConfig.micro_batches x data x fsdp x expert (twice that under "
            "measure 'cross_fitted'). Choose prompts, samples and minibatches of RolloutConfig "
            "so that they can, or lower those."
        )
    step = divisor * -(-rows // (RUNGS * divisor))
    return (*range(step, rows, step), rows)


def padding_waste(batches: Sequence[Minibatch]) -> float:
    """Share of a rollout's token positions, rows x columns, that hold no token.

    The train step computes on all of them alike.
    """
    present = [np.asarray(batch.segment_ids) > 0 for batch in batches]
    return float(1 - np.mean(present))


def _divisor(config: TrainConfig) -> int:
    """What rows are cut into: devices and micro-batches, of each half where there are halves."""
    halves = 2 if "gradient_halves" in config.mtp.make_measure().evidence else 1
    return halves * config.layout.micro_batches * config.layout.row_parts


def _sequences(minibatch: Minibatch, keep_uncounted: bool) -> list[tuple[int, np.ndarray]]:
    """Row and columns of every sequence, in order."""
    found = []
    counted = np.asarray(minibatch.response_mask)
    for row, segment_ids in enumerate(np.asarray(minibatch.segment_ids)):
        for number in np.unique(segment_ids[segment_ids > 0]):
            columns = np.flatnonzero(segment_ids == number)
            if keep_uncounted or counted[row, columns].any():
                found.append((row, columns))
    return found


def _stack(portions: Sequence[Minibatch]) -> Minibatch:
    """The rows of all portions, one after the other."""
    return jax.tree.map(lambda *values: np.concatenate(values, axis=-2), *portions)
