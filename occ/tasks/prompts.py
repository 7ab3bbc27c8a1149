"""Prompts as arrays, and the order in which a run sees them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from occ.tasks.tokenizer import Tokenizer


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded token ids.

    Args:
      tokenizer: of the prompts.
      prompts: N texts, none empty.
      columns: P.

    Returns:
      int32 [N, P], and bool [N, P], False on padding.

    Raises:
      ValueError: a prompt has no token, or more than `columns`.
    """
    tokens = np.full((len(prompts), columns), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(prompts), columns), bool)
    for row, prompt in enumerate(prompts):
        ids = tokenizer.encode_prompt(prompt)
        if not 0 < len(ids) <= columns:
            raise ValueError(
                f"encode_prompts: prompt {row} has {len(ids)} tokens, expected 1 to {columns}: "
                f"{prompt[:80]!r}. Leave it out, or raise max_prompt_tokens."
            )
        tokens[row, columns - len(ids) :] = ids
        mask[row, columns - len(ids) :] = True
    return tokens, mask


def prompt_indices(seed: int, step: int, count: int, size: int) -> np.ndarray:
    """Which prompts the rollout `step` takes: a function of seed and step alone.

    Each epoch is a permutation of its own, so every prompt is seen once before any is seen twice.
    Nothing needs to be saved for a run to go on where it stopped.

    Args:
      seed: of the order.
      step: number of the rollout, from 0.
      count: prompts a rollout.
      size: prompts there are.

    Returns:
      int64 [count].

    Raises:
      ValueError: no prompts.

    >>> sorted(np.concatenate([prompt_indices(0, s, 2, 6) for s in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    if size < 1:
        raise ValueError("prompt_indices: there are no prompts to choose from.")
    serial = np.arange(step * count, (step + 1) * count)
    epochs = serial // size
    permutations = {
        epoch: np.random.default_rng((seed, int(epoch))).permutation(size)
        for epoch in np.unique(epochs)
    }
    return np.array([permutations[e][i % size] for e, i in zip(epochs, serial, strict=True)])
