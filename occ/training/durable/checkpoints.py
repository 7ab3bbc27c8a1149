"""Checkpoints of a run with Orbax: written in the background, kept by policy, resumed from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp

from occ.buckets import Path, UnreachableError, absolute, is_bucket
from occ.training.durable import disk
from occ.training.durable.fingerprint import fingerprint
from occ.training.durable.history import History
from occ.training.processes import is_first, wait_for_all

UNREADABLE = (ValueError, LookupError, TypeError, FileNotFoundError)
"""What Orbax, TensorStore and JSON raise for files that are missing, cut or changed."""


_UNANSWERED = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|Connection refused"
)
"""Words of TensorStore's errors that tell nothing of what is in a bucket."""

_ONE_AT_A_TIME = threading.RLock()
"""Orbax's signals and event loops are a process's: two threads that save at once break both."""


class DamagedError(ValueError):
    """A checkpoint that cannot be read, or is not what was saved, or not where it was saved."""


class Restored(NamedTuple):
    """A checkpoint.

    Attributes:
      number: rollouts that were finished.
      state: a tree of arrays, of a run its `TrainState`.
      history: what the run remembered.
    """

    number: int
    state: Any
    history: History


class Checkpoints:
    """Checkpoints in one folder, numbered by the rollouts that were finished.

    A folder with a number for its name is a whole checkpoint: Orbax writes beside it and renames.
    In a bucket it is one with commit_success.txt, which Orbax writes last.
    Each holds the state and, as JSON, a record: its number, whose it is, the history, a fingerprint
    of every array of the state, and a digest of them all. A changed bit in an array is an error
    that neither Orbax nor TensorStore would notice, and so is a copy of another checkpoint.

    What every start brings and training never changes is not written: its fingerprints are, so that
    a run does not go on beside other frozen weights.

    Args:
      folder: where they are, inside the run's folder; made if missing.
      keep: how many of the newest to keep, beside the best by sampled accuracy.
      owner: whose they are, in a word; "" saves none, and reads those of all.
      read_only: nothing in the folder is made, deleted or renamed, so that a run which is writing
        writing there is not disturbed; for `read`.
      frozen: whether the leaf at a "path/of/leaf" of the state is brought and not written; `like`
        must then hold its array.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        owner: str = "",
        read_only: bool = False,
        frozen: Callable[[str], bool] = lambda path: False,
    ):
        self._folder = absolute(folder)
        self._owner = owner
        self._frozen = frozen
        self._policy = _NewestAndBest(keep)
        self._read_only = read_only
        self._in_bucket = is_bucket(folder)
        self._bytes = 0  # of the last state that was given to save
        options = ocp.CheckpointManagerOptions(
            create=True, cleanup_tmp_directories=True, preservation_policy=self._policy
        )
        if read_only:
            options = ocp.CheckpointManagerOptions(
                create=False, read_only=True, save_interval_steps=0
            )
        with self._full_disk_explained(), _ONE_AT_A_TIME:
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the checkpoints that there are."""
        return tuple(self._manager.all_steps())

    def save(self, number: int, state: Any, history: History) -> None:
        """Starts to save the state after `number` finished rollouts.

        Returns when the state is copied, and may then be donated; writing goes on behind, but for
        threads other than the main one, which write one after the other.

        Raises:
          DiskFullError: now, or in writing the one before.
        """
        if number in self._manager.all_steps():
            return
        leaves = _as_dict(state)
        prints = jax.device_get(fingerprint(leaves))
        record: dict[str, Any] = {
            "number": number,
            "owner": self._owner,
            "history": dataclasses.asdict(history),
            "fingerprint": {name: int(value) for name, value in prints.items()},
        }
        record["digest"] = _digest(record)
        leaves = {name: leaf for name, leaf in leaves.items() if not self._is_frozen(name)}
        self._bytes = sum(leaf.nbytes for leaf in leaves.values())
        self._policy.best = history.best_rollout
        with self._full_disk_explained(), _ONE_AT_A_TIME:
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(leaves), record=ocp.args.JsonSave(record)
                ),
                force=True,  # when to save is the loop's decision
            )
            if threading.current_thread() is not threading.main_thread():
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Returns when all that was given to `save` is whole.

        Raises:
          DiskFullError: it could not be written.
        """
        with self._full_disk_explained():
            self._manager.wait_until_finished()

    def restore(self, like: Any, most: int | None = None) -> Restored | None:
        """The newest checkpoint that can be read; None if there are none at all.

        Newer ones that are damaged are reported and renamed, so that their numbers are free.

        Args:
          like: a state of the shapes, dtypes and shardings wanted.
          most: finished rollouts that the run's rows know of, where some were lost; a checkpoint
            of more cannot be used.

        Raises:
          DamagedError: there are checkpoints, and none can be read. All stay where they are.
        """
        damaged: dict[int, DamagedError] = {}
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                if most is not None and number > most:
                    raise DamagedError(f"metrics.jsonl was cut after the rows of {most} rollouts")
                restored = self._read(number, like)
            except DamagedError as error:
                damaged[number] = error
                continue
            for newer, error in damaged.items():
                self._set_aside(newer, error, restored.number)
            return restored
        if not damaged:
            return None
        reasons = "; ".join(f"{number}: {error}" for number, error in damaged.items())
        raise DamagedError(
            f"none of the checkpoints in {self._folder} can be read ({reasons}). Go on with the "
            "versions in environment.json if packages have changed since, or put the files back; "
            "to start from scratch, delete this folder."
        )

    def read(self, like: Any, which: Literal["newest", "best"] = "newest") -> Restored:
        """A checkpoint to look at; the folder stays as it is.

        Args:
          like: as of `restore`.
          which: the newest that can be read, or the best by sampled accuracy, as the newest knows
            it.

        Raises:
          ValueError: there are none, or no evaluation has yet said which is best.
          DamagedError: none can be read, or the best cannot.
        """
        damaged: dict[int, DamagedError] = {}
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                newest = self._read(number, like)
            except DamagedError as error:
                damaged[number] = error
                continue
            if which == "newest":
                return newest
            best = newest.history.best_rollout
            if best is None:
                raise ValueError(f"{self._folder}: no evaluation yet. Take the newest checkpoint.")
            return newest if best == newest.number else self._read(best, like)
        if damaged:
            raise DamagedError(f"none of the checkpoints in {self._folder} can be read: {damaged}.")
        raise ValueError(f"{self._folder} holds no checkpoint. Train first.")

    def reached_preemption(self, number: int) -> bool:
        """Whether all processes of a job that is being preempted should now save and stop.

        Always False without `jax.distributed`, whose service hears of it and agrees on a number.
        """
        return self._manager.reached_preemption(number)

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          DiskFullError: the last one could not be written.
        """
        with self._full_disk_explained(), _ONE_AT_A_TIME:
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except disk.DiskFullError:
            if error is None:  # else the first error tells more
                raise
        finally:
            if kind is not None and is_first() and not (self._read_only or self._in_bucket):
                # At the next start they would go anyway; a full disk needs the space now.
                for unfinished in self._folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(unfinished, ignore_errors=True)

    def _full_disk_explained(self) -> contextlib.AbstractContextManager[None]:
        return disk.explained(self._folder.parent, self._bytes)

    def _read(self, number: int, like: Any) -> Restored:
        wanted = _as_dict(like)
        brought = {name: leaf for name, leaf in wanted.items() if self._is_frozen(name)}
        if unknown := [name for name, x in brought.items() if not isinstance(x, jax.Array)]:
            raise ValueError(
                f"checkpoints in {self._folder} hold no frozen weights, and whoever reads one must "
                f"bring its frozen weights: expected arrays, got shapes, as {unknown[0]}. Use "
                "occ.training.start.starting_point.with_frozen."
            )
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in wanted.items()
            if name not in brought
        }
        with _UnreadableIsDamaged(self._in_bucket), _ONE_AT_A_TIME:
            restored = self._manager.restore(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
                ),
            )
            leaves, record = {**restored["state"], **brought}, restored["record"]
            digest = record.pop("digest")
            history, saved = History.read(record["history"]), record["fingerprint"]
        if digest != _digest(record):
            raise DamagedError("its record is not what was saved")
        if record.get("number") != number:
            raise DamagedError(f"it was saved as checkpoint {record.get('number')}")
        if self._owner and record["owner"] not in ("", self._owner):
            raise DamagedError("it was saved by a run of another configuration")
        for name, leaf in wanted.items():
            if leaves[name].dtype != leaf.dtype:
                raise DamagedError(f"{name} is {leaves[name].dtype}, not {leaf.dtype}")
        found = jax.device_get(fingerprint(leaves))
        changed = [name for name in wanted if int(found[name]) != saved.get(name)]
        if frozen := [name for name in changed if name in brought]:
            raise DamagedError(
                f"it was saved beside other frozen weights than the run has now, for example "
                f"{frozen[0]}: put the files back that the run began from"
            )
        if changed:
            raise DamagedError(f"not what was saved: {', '.join(changed)}")
        structure = jax.tree.structure(like)
        ordered = [leaves[name] for name in wanted]
        return Restored(number, jax.tree.unflatten(structure, ordered), history)

    def _is_frozen(self, name: str) -> bool:
        return self._frozen(name.split(":", 1)[1].replace(".", "/"))

    def _set_aside(self, number: int, reason: DamagedError, used: int) -> None:
        source = self._folder / str(number)
        target = set_aside(source)
        self._manager.reload()
        warnings.warn(
            f"checkpoint {source} cannot be used ({reason}); it is now {target.name}, and the run "
            f"goes on from checkpoint {used}.",
            RuntimeWarning,
            stacklevel=3,
        )


def set_aside(source: Path) -> Path:
    """Renames a damaged folder to `NAME.damaged`, or `.damaged-2` and so on; returns the path.

    In a bucket it is copied there and deleted; what a kill leaves on both sides is still damaged.
    """
    target, copies = source.with_name(f"{source.name}.damaged"), 1
    while target.exists():
        copies += 1
        target = source.with_name(f"{source.name}.damaged-{copies}")
    wait_for_all(f"{source} is damaged")
    if is_first():
        source.rename(target)
    wait_for_all(f"{source} is set aside")
    return target


@dataclasses.dataclass
class _NewestAndBest:
    """Orbax's protocol of a preservation policy."""

    keep: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        newest = {info.step for info in checkpoints[-self.keep :]}
        return [info.step in newest or info.step == self.best for info in checkpoints]


@dataclasses.dataclass(frozen=True)
class _UnreadableIsDamaged(contextlib.AbstractContextManager[None]):
    """Turns the errors of unreadable files into `DamagedError`, and no others."""

    in_bucket: bool

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.in_bucket and isinstance(error, ValueError) and _UNANSWERED.search(str(error)):
            raise UnreachableError(
                f"a checkpoint could not be read, and may be whole: {error}"
            ) from error
        # Orbax raises Exception itself, no subclass, for a piece of an array that is not there.
        if kind is Exception or isinstance(error, UNREADABLE):
            words = f"{kind.__name__ if kind else ''}: {error}".split("\n")[0]
            raise DamagedError(words[:200]) from error


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _as_dict(state: Any) -> dict[str, Any]:
    """The leaves by path: a form that does not change with the classes around them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    width = len(str(len(leaves)))
    return {
        f"{i:0{width}d}:{jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for i, (path, leaf) in enumerate(leaves)
    }
