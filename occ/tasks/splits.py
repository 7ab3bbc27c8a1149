"""Train and test problems without a common prompt, from a stream of problems."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from occ.tasks.task import Problem

TEST_SHARE = 0.2


def in_test(prompt: str) -> bool:
    """Whether a prompt belongs to the test split: by a hash that is the same on every machine."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < TEST_SHARE


def split(
    problems: Iterable[Problem], train_size: int, test_size: int
) -> tuple[list[Problem], list[Problem]]:
    """The first distinct problems of either split.

    Args:
      problems: any number of problems, repeats included.
      train_size, test_size: how many to take.

    Raises:
      ValueError: the stream ends before.
    """
    train: dict[str, Problem] = {}
    test: dict[str, Problem] = {}
    for problem in problems:
        side, wanted = (test, test_size) if in_test(problem.prompt) else (train, train_size)
        if len(side) < wanted:
            side.setdefault(problem.prompt, problem)
        if len(train) == train_size and len(test) == test_size:
            return list(train.values()), list(test.values())
    raise ValueError(
        f"split: found {len(train)} distinct training and {len(test)} test prompts, expected "
        f"{train_size} and {test_size}. Ask for fewer, or make the task's settings wider."
    )
