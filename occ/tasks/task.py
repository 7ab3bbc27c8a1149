"""The interface of a task: prompts with verifiable answers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from occ.tasks.tokenizer import Tokenizer


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
      verifier: `(problem, completion) -> reward in [0, 1]`; raises `VerifierError` if it fails.
      max_prompt_tokens, max_response_tokens: tokens, enough for every problem here.
    """

    name: str
    tokenizer: Tokenizer
    train: Sequence[Problem]
    test: Sequence[Problem]
    verifier: Callable[[Problem, str], float]
    max_prompt_tokens: int
    max_response_tokens: int

    def final_answer(self, completion: str) -> str | None:
        """What a completion answers, in one spelling, for majorities; None without an answer."""
        return completion.strip() or None

    def verify_batch(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards of completions.

        Args:
          problems: N problems.
          completions: N texts.

        Returns:
          float32 [N] rewards, and bool [N], False for samples that could not be judged: their
          reward is 0 here and must not be used.
        """
        rewards = np.zeros(len(problems), np.float32)
        valid = np.ones(len(problems), bool)
        for i, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
            try:
                rewards[i] = self.verifier(problem, completion)
            except VerifierError:
                valid[i] = False
        return rewards, valid


def load(name: str, **options: Any) -> Task:
    """Loads a task by name.

    Args:
      name: "arithmetic", "number_filtering", "star_graph", "reasoning_gym" with `dataset=...`,
        "math" with the name of a published set, or "dapo_math_17k", which is such a set.
      **options: of that task's own loader.

    Raises:
      ValueError: unknown task or option.
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
    module = importlib.import_module(f"occ.tasks.{loaders[name]}")
    if name == "dapo_math_17k":
        options = {"dataset": name, **options}
    try:
        return module.load(**options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise ValueError(f"load: task {name!r} does not take these options: {error}.") from None
        raise
