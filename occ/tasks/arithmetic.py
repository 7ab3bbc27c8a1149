"""Sums of a few numbers in compact form, `12+34=` -> `46`: the laptop's task.

Problems and verifier are reasoning-gym's `chain_sum`.
"""

from __future__ import annotations

from collections.abc import Iterator

import reasoning_gym

from occ.tasks import splits
from occ.tasks.demonstrations import DIGITS
from occ.tasks.task import Problem, Task
from occ.tasks.tokenizer import CharacterTokenizer


def load(
    *,
    terms: int = 2,
    digits: int = 2,
    operators: str = "+",
    train_size: int = 6000,
    test_size: int = 1024,
    seed: int = 0,
) -> Task:
    """Chains of additions, or of additions and subtractions.

    The reward is 1 for the exact answer and 0 otherwise: the package's verifier also accepts
    leading zeros, signs and decimals, which a policy could learn instead of the task.

    Args:
      terms: numbers in a sum.
      digits: decimal digits of each number.
      operators: "+" or "+-"; the harder second also has negative answers.
      train_size, test_size: distinct prompts.
      seed: of the problems.

    Raises:
      ValueError: other operators, or more prompts asked for than there are.
    """
    if operators not in ("+", "+-"):
        raise ValueError(f"arithmetic: operators must be '+' or '+-', got {operators!r}.")
    count = 16 * (train_size + test_size)
    dataset = reasoning_gym.create_dataset(
        "chain_sum",
        size=count,
        seed=seed,
        min_terms=terms,
        max_terms=terms,
        min_digits=digits,
        max_digits=digits,
    )

    def problems() -> Iterator[Problem]:
        for index in range(count):
            entry = dataset[index]
            expression = entry["metadata"]["expression"].replace(" ", "")
            if operators == "+-" or "-" not in expression:
                yield Problem(expression + "=", entry["answer"], entry)

    def verify(problem: Problem, completion: str) -> float:
        if completion != problem.answer:
            return 0.0
        return float(dataset.score_answer(completion, problem.entry) == 1.0)

    train, test = splits.split(problems(), train_size, test_size)
    return Task(
        name=f"arithmetic({terms} terms, {digits} digits, {operators})",
        tokenizer=CharacterTokenizer(DIGITS + operators + "="),
        train=train,
        test=test,
        verifier=verify,
        max_prompt_tokens=terms * (digits + 1),
        # A further digit for carries, a sign, and the end token.
        max_response_tokens=digits + len(str(terms)) + ("-" in operators) + 1,
    )
