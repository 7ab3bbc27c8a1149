"""Prompts and verifiers."""

from occ.tasks.task import Problem, Task, VerifierError, load

__all__ = ["Problem", "Task", "VerifierError", "load"]
