"""The path to a goal in a star of several arms: `ac|cd|ab|be/ad=` -> `acd`.

Arms of equal length leave one start; the prompt lists all edges in random order, then start and
goal, which is the end of one arm. After the first step the path only has to be followed along its
edges, so a next-token model is corrected on every token but one: the step out of the start, for
which it has to look ahead to the goal.

Reference: Bachmann and Nagarajan, The pitfalls of next-token prediction, arXiv 2403.06963.
Differs from the paper in labels of one character, and in a fixed alphabet of them.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

import numpy as np

from occ.tasks import splits
from occ.tasks.task import Problem, Task
from occ.tasks.tokenizer import CharacterTokenizer

LABELS = string.ascii_lowercase + string.ascii_uppercase
SIGNS = "|/="


def load(
    *,
    degree: int = 2,
    arm_length: int = 2,
    labels: int = 20,
    train_size: int = 20_000,
    test_size: int = 1024,
    seed: int = 0,
) -> Task:
    """Star graphs with one goal each.

    The reward is 1 for the exact path, start and goal included, and 0 otherwise. A wrong answer to
    demonstrate is the path along another arm.

    Args:
      degree: arms; a model that guesses the first step is right once in so many.
      arm_length: edges of an arm.
      labels: letters that nodes are named with, each graph by some of them.
      train_size, test_size: distinct prompts.
      seed: of the problems.

    Raises:
      ValueError: sizes that make no star, or too few labels for its nodes.
    """
    nodes = 1 + degree * arm_length
    if degree < 2 or arm_length < 1:
        raise ValueError(
            "star_graph: expected degree >= 2 and arm_length >= 1, got "
            f"{degree} and {arm_length}: with less there is no choice to make."
        )
    if not nodes <= labels <= len(LABELS):
        raise ValueError(
            f"star_graph: {degree} arms of {arm_length} have {nodes} nodes; labels must be between "
            f"that and {len(LABELS)}, got {labels}."
        )
    rng = np.random.default_rng(seed)

    def problems() -> Iterator[Problem]:
        for _ in range(8 * (train_size + test_size)):
            start, *others = (LABELS[i] for i in rng.permutation(labels)[:nodes])
            outward = "".join(others)
            arms = [start + outward[i : i + arm_length] for i in range(0, len(outward), arm_length)]
            edges = [arm[i : i + 2] for arm in arms for i in range(arm_length)]
            listed = "|".join(edges[i] for i in rng.permutation(len(edges)))
            # The nodes were drawn at random, so the first arm is as good a choice as any.
            path, *wrong = arms
            yield Problem(f"{listed}/{start}{path[-1]}=", path, wrong_answers=tuple(wrong))

    train, test = splits.split(problems(), train_size, test_size)
    return Task(
        name=f"star_graph(degree {degree}, arms of {arm_length}, {labels} labels)",
        tokenizer=CharacterTokenizer(LABELS[:labels] + SIGNS),
        train=train,
        test=test,
        verifier=lambda problem, completion: float(completion == problem.answer),
        max_prompt_tokens=3 * degree * arm_length + 3,
        max_response_tokens=arm_length + 2,
    )
