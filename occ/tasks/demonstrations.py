"""Answers to learn from in a warm start, some of them wrong on purpose."""

from __future__ import annotations

import numpy as np

from occ.tasks.task import Problem

DIGITS = "0123456789"


def corrupt(answer: str, rng: np.random.Generator) -> str:
    """The answer with exactly one digit replaced by another; sign and length stay.

    The first digit may become 0, so that every digit is equally likely to be wrong.

    Raises:
      ValueError: the answer has no digit.
    """
    places = [i for i, character in enumerate(answer) if character in DIGITS]
    if not places:
        raise ValueError(
            f"corrupt: {answer!r} has no digit that could be wrong. Set "
            "WarmStartConfig.wrong_fraction to 0, or give the task's problems wrong_answers."
        )
    place = places[rng.integers(len(places))]
    others = DIGITS.replace(answer[place], "")
    return answer[:place] + others[rng.integers(len(others))] + answer[place + 1 :]


def mistake(problem: Problem, rng: np.random.Generator) -> str:
    """One of the problem's wrong answers; the right one with a wrong digit where it has none.

    Raises:
      ValueError: it has none, and its answer has no digit.
    """
    if problem.wrong_answers:
        return problem.wrong_answers[int(rng.integers(len(problem.wrong_answers)))]
    return corrupt(problem.answer, rng)


def demonstrations(
    problems: list[Problem], wrong_fraction: float, rng: np.random.Generator
) -> list[str]:
    """Answers to the problems, of which a fraction in expectation is a mistake.

    A model that is trained on these knows the right answer, which is the most frequent one, but
    samples it only about as often as it was shown.
    """
    wrong = rng.random(len(problems)) < wrong_fraction
    return [
        mistake(problem, rng) if is_wrong else problem.answer
        for problem, is_wrong in zip(problems, wrong, strict=True)
    ]
