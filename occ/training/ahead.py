"""Samples of the next rollout, drawn while the run trains on the one in hand.

    engine:    | samples 0 | samples 1 | samples 2 | samples 3 |
    this run:              | train 0   | train 1   | train 2   |

The samples of rollout n + 1 are then of the policy before the updates of rollout n: one step
off-policy. The old log-probs are those of the policy that is trained, as always, and a truncated
importance weight old / rollout policy stands for what has moved in between.

Reference: Noukhovitch et al., Asynchronous RLHF, arXiv 2410.18252.
"""

from __future__ import annotations

import concurrent.futures
import io
import warnings
import zipfile
import zlib
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from occ.generation.sampling import Generation, Work
from occ.models.policy import Policy
from occ.tasks import Task
from occ.training.config import TrainConfig
from occ.training.durable.run_folder import RunFolder
from occ.training.processes import any_of_all, wait_for_all
from occ.training.rollout import Drawn, RolloutPrograms, answers, draw, requests

UNREADABLE = (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for files that are missing, cut or changed, and `_from_bytes` for others."""


class _Begun(NamedTuple):
    """Samples of a rollout that are there, or will be."""

    number: int
    drawn: concurrent.futures.Future[Drawn]


class Ahead:
    """Draws the samples of a run's rollouts, one rollout ahead if `EngineConfig.overlap` says so.

    An engine of its own samples while this process trains. The in-process engine, which has
    nothing to sample with in the meantime, does so before: the samples are those of an overlap,
    without its gain.

    A checkpoint is followed by samples that no later policy could draw again, so they are kept
    beside it, as ahead-N.npz in the run's folder: a killed run goes on to the same bits.

    Args:
      config: of the run.
      task: prompts.
      files: of the run.
    """

    def __init__(self, config: TrainConfig, task: Task, files: RunFolder):
        self._config, self._task, self._files = config, task, files
        self._on = config.engine.overlap
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "ahead")
        self._begun: _Begun | None = None

    def take(self, number: int, programs: RolloutPrograms, policy: Policy) -> Drawn:
        """The samples of a rollout: those that were begun, or else of this policy, now.

        Raises:
          EngineError: of the engine.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun.number == number:
            return begun.drawn.result()
        return draw(programs.engine, policy, requests(programs, self._config, self._task, number))

    def begin(self, number: int, programs: RolloutPrograms, policy: Policy) -> None:
        """Begins to draw a rollout's samples with this policy, which may then be donated."""
        if not self._on or number >= self._config.rollouts:
            return
        wanted = requests(programs, self._config, self._task, number)
        engine = programs.engine
        engine.update_weights(policy)
        if self._config.engine.external:
            drawn = self._thread.submit(answers, engine, wanted)
        else:
            drawn = _done(answers(engine, wanted))
        self._begun = _Begun(number, drawn)

    def wait(self) -> None:
        """Returns when the engine has nothing to do."""
        if self._begun is not None:
            concurrent.futures.wait([self._begun.drawn])

    def save(self, number: int, others: Collection[int]) -> None:
        """Keeps the samples of the rollout that follows checkpoint `number`; before that is saved.

        Args:
          number: of the checkpoint.
          others: checkpoints that there are, whose samples are kept too.

        Raises:
          DiskFullError: they could not be written.
        """
        if not self._on:
            return
        if self._begun is not None and self._begun.number == number:
            self._files.write(_name(number), _to_bytes(self._begun.drawn.result()))
        self._files.keep_only("ahead-*.npz", {_name(n) for n in (*others, number)})

    def restore(self, number: int) -> None:
        """Finds the samples of the rollout that follows checkpoint `number`.

        Where they are lost, on one of several processes even, all draw others, and say so.
        """
        if not self._on or number in (0, self._config.rollouts):
            return
        wait_for_all("samples that were drawn ahead")
        file = self._files.path / _name(number)
        drawn, problem = None, "by another process"
        try:
            drawn = _from_bytes(file.read_bytes())
        except UNREADABLE as error:
            problem = f"{type(error).__name__}: {error}"
        if any_of_all(drawn is None):
            warnings.warn(
                f"{file}, the samples of rollout {number} that were drawn before it, cannot be "
                f"read ({problem}): they are drawn again by the policy of "
                "now, and the run goes on as well, but not to the same bits.",
                RuntimeWarning,
                stacklevel=2,
            )
        elif drawn is not None:
            self._begun = _Begun(number, _done(drawn))

    def close(self) -> None:
        """Nothing more is begun; what is under way is nobody's."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _done(drawn: Drawn) -> concurrent.futures.Future[Drawn]:
    future: concurrent.futures.Future[Drawn] = concurrent.futures.Future()
    future.set_result(drawn)
    return future


def _name(number: int) -> str:
    return f"ahead-{number}.npz"


def _to_bytes(drawn: Drawn) -> bytes:
    content, arrays = io.BytesIO(), dict[str, Any](_flat(drawn))
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def _flat(values: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of nested named tuples and dicts, by their paths."""
    if values is None:
        return {}
    if not isinstance(values, tuple | dict):
        return {prefix: np.asarray(values)}
    named = values if isinstance(values, dict) else values._asdict()  # type: ignore[attr-defined]
    flat: dict[str, np.ndarray] = {}
    for name, value in named.items():
        flat |= _flat(value, f"{prefix}|{name}" if prefix else name)
    return flat


def _from_bytes(content: bytes) -> Drawn:
    nested: dict[str, Any] = {"greedy": None, "metrics": {}}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for path, value in arrays.items():
            *above, name = path.split("|")
            there = nested
            for part in above:
                there[part] = there.get(part) or {}
                there = there[part]
            there[name] = value

    def generation(fields: dict[str, Any]) -> Generation:
        return Generation(**{**fields, "work": Work(**fields["work"])})

    greedy = nested["greedy"]
    return Drawn(
        generation(nested["sampled"]),
        None if greedy is None else generation(greedy),
        {name: value.tolist() for name, value in nested["metrics"].items()},
    )
