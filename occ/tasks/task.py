"""The interface of a task: prompts with verifiable answers."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from occ.extras import require
from occ.tasks.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class VerifierError(Exception):
    """The verifier could not judge an answer; says nothing about the answer."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prompt.

    Attributes:
      prompt: text as the model sees it.
      answer: a correct answer, for demonstrations and logs.
      entry: what the verifier needs besides.
      wrong_answers: mistakes that a noisy demonstration chooses from; none leaves it to change one
        digit of the answer.
    """

    prompt: str
    answer: str
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrong_answers: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts and a verifier.

    Attributes:
      name: of the task.
      tokenizer: of prompts and answers.
      train, test: problems; no prompt is in both.
      verifier: `(problem, completion) -> reward`; raises if it fails.
      max_prompt_tokens, max_response_tokens: tokens, enough for every problem here.
      reward_range: lowest and highest reward; another one is no judgement.
    """

    name: str
    tokenizer: Tokenizer
    train: Sequence[Problem]
    test: Sequence[Problem]
    verifier: Callable[[Problem, str], float]
    max_prompt_tokens: int
    max_response_tokens: int
    reward_range: tuple[float, float] = dataclasses.field(default=(0.0, 1.0), kw_only=True)

    def final_answer(self, completion: str) -> str | None:
        """What a completion answers, in one spelling, for majorities; None without an answer."""
        return completion.strip() or None

    def verify_batch(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards of completions.

        A sample whose verifier raises, or returns what is no finite number in `reward_range`, is
        invalid. The first of them is named in a warning, with their number.

        Args:
          problems: N problems.
          completions: N texts.

        Returns:
          float32 [N] rewards, and bool [N], False for samples that could not be judged: their
          reward is 0 here and must not be used.
        """
        rewards = np.zeros(len(problems), np.float32)
        reasons = dict[int, str]()
        for i, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
            try:
                rewards[i] = checked_reward(self.verifier(problem, completion), self.reward_range)
            except Exception as error:  # whatever a verifier raises, it did not judge the sample
                reasons[i] = f"{type(error).__name__}: {error}"
        self.warn_of_invalid(problems, completions, reasons)
        return rewards, np.array([i not in reasons for i in range(len(problems))], bool)

    def warn_of_invalid(
        self, problems: Sequence[Problem], completions: Sequence[str], reasons: Mapping[int, str]
    ) -> None:
        """Names the first sample that could not be judged.

        Args:
          problems, completions: N each.
          reasons: why, by number of the sample.
        """
        if reasons:
            first = min(reasons)
            logger.warning(
                "%s: %d of %d samples could not be judged and are left out; the first, sample %d "
                "of problem %.80r with answer %.80r: %s",
                *(self.name, len(reasons), len(problems), first),
                *(problems[first].prompt, completions[first], reasons[first]),
            )


def checked_reward(reward: object, bounds: tuple[float, float]) -> float:
    """A reward as a float.

    Args:
      reward: what a verifier returned.
      bounds: lowest and highest reward.

    Raises:
      VerifierError: it is no finite number between them.

    >>> checked_reward(1, (0.0, 1.0))
    1.0
    """
    low, high = bounds
    if (
        not isinstance(reward, int | float | np.integer | np.floating)
        or not math.isfinite(reward)
        or not low <= reward <= high
    ):
        raise VerifierError(
            f"expected a finite reward from {low} to {high}, got {reward!r}. Mend the verifier, or "
            "state another reward_range."
        )
    return float(reward)


def load(name: str, **options: Any) -> Task:
    """Loads a task by name.

    Args:
      name: "arithmetic", "number_filtering", "star_graph", "reasoning_gym" with `dataset=...`,
        "math" with the name of a published set, or "dapo_math_17k", which is such a set.
      **options: of that task's own loader.

    Raises:
      ValueError: unknown task or option.
      ImportError: an extra that the task needs is not installed.
    """
    # A loader is imported when it is asked for, so that one task can be used without the packages
    # of all.
    loaders = {
        "arithmetic": "arithmetic",
        "dapo_math_17k": "mathematics",
        "math": "mathematics",
        "number_filtering": "number_filtering",
        "reasoning_gym": "reasoning_gym",
        "star_graph": "star_graph",
    }
    if name not in loaders:
        raise ValueError(f"load: unknown task {name!r}; expected one of {sorted(loaders)}.")
    if loaders[name] == "mathematics":
        modules = ("math_verify", "mpmath", "pyarrow", "requests")
        require("data,math", f"task {name!r}", *modules)
    module = importlib.import_module(f"occ.tasks.{loaders[name]}")
    if name == "dapo_math_17k":
        options = {"dataset": name, **options}
    try:
        return module.load(**options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise ValueError(f"load: task {name!r} does not take these options: {error}.") from None
        raise
