"""Programs in processes of their own that take a step when it is their turn.

The process that compares writes a line, the program takes one step and answers with a line of
JSON. So steps of all programs are interleaved, whatever else the machine does touches all alike,
and no program is ever compiled, imported or warmed up while another is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

STEP, FORGET_PEAK = "step", "forget_peak"


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step, ready to be taken.

    Attributes:
      step: takes one step to its end, and returns the RL loss and the gradient's norm before
        clipping, both of the weights before the step.
      details: what the comparison should report, such as versions and threads.
    """

    step: Callable[[], tuple[float, float]]
    details: dict[str, Any]


def serve(build: Callable[[], Program]) -> None:
    """Builds a program and takes its turns until standard input ends.

    What libraries print goes to standard error: standard output belongs to the answers.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    program = build()
    print(json.dumps(program.details), file=answers)
    for line in sys.stdin:
        answer = _timed(program) if line.strip() == STEP else _forget_peak()
        print(json.dumps(answer), file=answers)


def _timed(program: Program) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    loss, norm = program.step()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "loss": loss,
        "grad_norm": norm,
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    """Of resident memory; Linux's `getrusage` would count that of the parent process too."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _forget_peak() -> dict[str, float]:
    """Compilers need more memory than the steps that they compile."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return {}


class Worker:
    """A program in its process, seen from the one that compares.

    Args:
      command: that ends up in `serve`.
      log: file for what the program prints.

    Raises:
      RuntimeError: the program ended; says where to read why.
    """

    def __init__(self, command: list[str], log: pathlib.Path):
        self.command, self.log = command, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.details = self._answer()

    def step(self) -> dict[str, float]:
        """Lets the program take one step: seconds, CPU seconds, loss, norm and peak memory."""
        return self.ask(STEP)

    def forget_peak(self) -> None:
        """Counts peak memory from here."""
        self.ask(FORGET_PEAK)

    def close(self) -> None:
        """Ends the program by ending its input."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, line: str) -> Any:
        """Its answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{' '.join(self.command)} ended with status {self.process.wait()} where an answer "
                f"was expected. What it printed is in {self.log}."
            )
        return json.loads(line)
