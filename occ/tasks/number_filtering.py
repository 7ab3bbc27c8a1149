"""Which numbers of a list pass a bound, in compact form: `k>42:17,55,90=` -> `55,90`.

Problems and verifier are reasoning-gym's `number_filtering`. `k` keeps the numbers that are larger
(`>`) or smaller (`<`) than the bound, `r` removes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import reasoning_gym

from occ.tasks import splits
from occ.tasks.demonstrations import DIGITS
from occ.tasks.task import Problem, Task
from occ.tasks.tokenizer import CharacterTokenizer

SYMBOLS = {
    "keep_larger": "k>",
    "keep_smaller": "k<",
    "remove_larger": "r>",
    "remove_smaller": "r<",
}


def load(
    *,
    numbers: int = 3,
    digits: int = 2,
    operations: Sequence[str] = tuple(SYMBOLS),
    train_size: int = 6000,
    test_size: int = 1024,
    seed: int = 0,
) -> Task:
    """Lists of whole numbers and a bound.

    The reward is 1 for the exact list and 0 otherwise. A wrong answer to demonstrate lists one
    number too many or one too few.

    Args:
      numbers: in a list.
      digits: decimal digits of each number and of the bound.
      operations: some of "keep_larger", "keep_smaller", "remove_larger", "remove_smaller".
      train_size, test_size: distinct prompts.
      seed: of the problems.

    Raises:
      ValueError: unknown operations, or more prompts asked for than there are.
    """
    unknown = sorted(set(operations) - set(SYMBOLS))
    if unknown or not operations:
        raise ValueError(
            f"number_filtering: operations must be some of {list(SYMBOLS)}, got {list(operations)}."
        )
    count = 8 * len(SYMBOLS) // len(set(operations)) * (train_size + test_size)
    dataset = reasoning_gym.create_dataset(
        "number_filtering",
        size=count,
        seed=seed,
        min_numbers=numbers,
        max_numbers=numbers,
        min_decimals=0,
        max_decimals=0,
        min_value=float(10 ** (digits - 1)),
        max_value=float(10**digits - 1),
    )

    def problems() -> Iterator[Problem]:
        for index in range(count):
            entry = dataset[index]
            facts = entry["metadata"]
            if facts["operation"] not in operations:
                continue
            given = facts["original_numbers"]
            prompt = f"{SYMBOLS[facts['operation']]}{facts['filter_value']}:{','.join(given)}="
            passed = [number in facts["result"] for number in given]
            yield Problem(prompt, _listed(given, passed), entry, _one_off(given, passed))

    def verify(problem: Problem, completion: str) -> float:
        answer = str(completion.split(",") if completion else [])
        return float(dataset.score_answer(answer, problem.entry) == 1.0)

    train, test = splits.split(problems(), train_size, test_size)
    return Task(
        name=f"number_filtering({numbers} numbers, {digits} digits)",
        tokenizer=CharacterTokenizer(DIGITS + "kr<>:,="),
        train=train,
        test=test,
        verifier=verify,
        max_prompt_tokens=2 + digits + 1 + numbers * (digits + 1),
        max_response_tokens=numbers * (digits + 1),
    )


def _listed(given: Sequence[str], chosen: Sequence[bool]) -> str:
    return ",".join(number for number, take in zip(given, chosen, strict=True) if take)


def _one_off(given: Sequence[str], passed: Sequence[bool]) -> tuple[str, ...]:
    """The lists in which one number was judged wrongly."""
    flips = ([take != (i == place) for i, take in enumerate(passed)] for place in range(len(given)))
    return tuple(_listed(given, flipped) for flipped in flips)
