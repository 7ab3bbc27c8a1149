"""Prompts and verifiers."""

from occ.extras import require
from occ.tasks.task import Problem, Task, VerifierError, load

__all__ = ["Problem", "Task", "VerifierError", "load"]

require("train", __name__, "reasoning_gym", "tensorflow_datasets")
