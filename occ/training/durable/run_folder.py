"""The files of a run: configuration, versions, metrics, samples, result."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import types
import typing
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from occ import json_files
from occ.buckets import Path, is_bucket
from occ.training.config import TrainConfig
from occ.training.durable import disk, lock
from occ.training.processes import from_first, is_first, on_first

if TYPE_CHECKING:
    from occ.training.durable.bucket_lock import BucketLock

FREE = (
    "layout.",
    "checkpoint_every",
    "keep_checkpoints",
    "max_bad_updates",
    "engine.python",
    "engine.address",
    "engine.folder",
    "engine.cache_gib",
    "engine.memory_share",
    "engine.start_seconds",
    "engine.request_seconds",
    "engine.silence_seconds",
)
"""Fields, or beginnings of their names, that a resumed run may change: they change no result."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")


class Recorded(NamedTuple):
    """What metrics.jsonl holds.

    Attributes:
      rollouts: n, when its rows are those of the rollouts 0 to n - 1.
      cut: whether a last line follows that is no row.
    """

    rollouts: int
    cut: bool


class RunFolder:
    """One run's folder, which nobody else has until it is closed.

        config.json        the resolved configuration; a run is only ever resumed with the same
                           (but for `FREE`: another mesh may go on)
        environment.json   package versions, commit, devices
        metrics.jsonl      a row a rollout; on disk before a checkpoint that follows it
        samples.jsonl      sample completions
        result.json        written once, at the end
        checkpoints/       Orbax
        ahead-N.npz        samples that were drawn before checkpoint N, of engine.overlap
        lock.json          the process that works here, while it does

    Of several processes the first writes, and all read.

    Args:
      path: the folder, local or in a bucket; made if missing.
      config: the run's configuration.

    Raises:
      ValueError: the folder holds a run with another configuration; the fields are named. Or there
        is a file in its place.
      LockedError: another process works here; so do later writes in a bucket, where one may have
        taken over from a process that was silent for too long.
    """

    def __init__(self, path: Path, config: TrainConfig):
        self.path = path
        self._lock: lock.FolderLock | BucketLock | None = None
        self._resolved = as_json(config)
        try:
            on_first(self._open)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        check_usable(self.path, self._resolved)
        with disk.explained(self.path, 0):
            if not is_bucket(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.take(self.path)
        self._write_json("config.json", self._resolved)
        if not (self.path / "environment.json").exists():
            self._write_json("environment.json", environment())

    def close(self) -> None:
        """Lets others work here."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run; None while there is none."""
        return read_result(self.path) if (self.path / "result.json").exists() else None

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result; the end of a run, after its last checkpoint is whole."""
        self._write_json("result.json", result)

    def rows(self, rollouts: int) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, which are those of so many rollouts.

        Raises:
          ValueError: they are not.
        """
        file = self.path / "metrics.jsonl"
        rows = read_rows(file)
        if [row.get("rollout") for row in rows] != list(range(rollouts)):
            raise ValueError(
                f"{file} should hold one row for each of {rollouts} rollouts, in order, and holds "
                f"{len(rows)} rows. Has another process written to it? Without its result this run "
                "is not finished: put the file back, or start again in another folder."
            )
        return rows

    def recorded(self) -> Recorded:
        """What metrics.jsonl holds, as the first process sees it.

        Raises:
          ValueError: a line before the last is not the row that belongs there.
        """
        found = Recorded(0, False)

        def look() -> None:
            nonlocal found
            found = _recorded(self.path / "metrics.jsonl")

        on_first(look)
        rollouts, cut = from_first(np.array(found, np.int32)).tolist()
        return Recorded(rollouts, bool(cut))

    def keep_rows_before(self, rollout: int) -> None:
        """Drops rows from `rollout` on, which a resumed run writes again, and lines cut short.

        Raises:
          ValueError: of the rollouts before, not each has its row.
        """

        def keep() -> None:
            file = self.path / "metrics.jsonl"
            kept = [row for row in _rows_of_rollouts(file) if row["rollout"] < rollout]
            if [row["rollout"] for row in kept] != list(range(rollout)):
                raise ValueError(
                    f"{file} should hold a row for each of the {rollout} rollouts before the "
                    f"newest checkpoint, and holds {len(kept)}. Put the file back, or start the "
                    "run again in another folder."
                )
            samples = _rows_of_rollouts(self.path / "samples.jsonl")
            for name, rows in (
                ("metrics.jsonl", kept),
                ("samples.jsonl", [row for row in samples if row["rollout"] < rollout]),
            ):
                if (self.path / name).exists():
                    self._replace(name, _lines(rows))

        on_first(keep)

    def append(self, *rows: dict[str, Any], name: str = "metrics.jsonl") -> None:
        """Adds rows, all in one write."""
        text = _lines(rows)
        if is_first():
            self._check_lock()
            with disk.explained(self.path, len(text)):
                disk.append_text(self.path / name, text)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whatever was there: it holds the old or the new."""
        self._replace(name, content)

    def keep_only(self, pattern: str, names: Collection[str]) -> None:
        """Deletes files of the folder that match a pattern and are not among these names."""
        if is_first():
            self._check_lock()
            for file in self.path.glob(pattern):
                if file.name not in names:
                    file.unlink(missing_ok=True)

    def _write_json(self, name: str, value: Any) -> None:
        self._replace(name, json_files.dump(value, indent=2) + "\n")

    def _replace(self, name: str, content: str | bytes) -> None:
        if is_first():
            self._check_lock()
            with disk.explained(self.path, len(content)):
                disk.replace(self.path / name, content)

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()


def check_usable(path: Path, resolved: dict[str, Any]) -> None:
    """Whether a run may work in a folder, without touching it.

    Args:
      path: the folder.
      resolved: from `as_json`.

    Raises:
      ValueError: it, or a folder above it, is a file; or it holds a run with another configuration,
        whose fields are named.
    """
    # Anything may lie beside anything in a bucket.
    for part in () if is_bucket(path) else (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"run folder {path}: {part} is a file. Choose another folder.")
    file = path / "config.json"
    if not file.exists():
        return
    before, now = flatten(json_files.read_object(file)), flatten(resolved)
    with contextlib.suppress(ValueError):  # fields that are younger have their defaults
        before = flatten(as_json(read_config(path)))
    different = sorted(
        name
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name) and not name.startswith(FREE)
    )
    if different:
        changes = ", ".join(
            f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in different
        )
        raise ValueError(
            f"run folder {path} holds a run with another configuration ({changes}). "
            "Resume it with the same one, or choose another folder."
        )


def as_json(config: TrainConfig) -> dict[str, Any]:
    """A configuration as config.json has it."""
    return json.loads(json_files.dump(dataclasses.asdict(config)))


def identity(config: TrainConfig) -> str:
    """A digest of all fields that decide a run's results: whose a checkpoint is."""
    text = json.dumps(_decides(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _decides(config: Any, above: str = "") -> dict[str, Any]:
    """Fields off their default, by dotted name: one that is added later changes nothing."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value, default = above + field.name, getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if f"{name}.".startswith(FREE) or value == default:
            continue
        if dataclasses.is_dataclass(value):
            found |= {name: type(value).__name__, **_decides(value, f"{name}.")}
        else:
            found[name] = value
    return found


def read_config(folder: Path) -> TrainConfig:
    """The configuration of a run, from its folder.

    Raises:
      ValueError: it holds no run, or one with a field that there is not, for example of another
        version of the project.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no run: it has no config.json.")
    values = json_files.read_object(file)
    try:
        return _as_declared(TrainConfig, values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: {error}. It was written by another version; environment.json has its commit."
        ) from error


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished run, from its folder.

    Raises:
      ValueError: result.json is not what a run writes; says what to do.
    """
    file = folder / "result.json"
    try:
        return json_files.read_object(file, "final", "reward_area")
    except ValueError as error:
        raise ValueError(
            f"{error} Or delete it: the run's command then writes it again, from the newest "
            "checkpoint."
        ) from error


def _as_declared(kind: Any, value: Any) -> Any:
    """A value of JSON as what a field was declared as."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        fields = {name: _as_declared(hints.get(name), entry) for name, entry in value.items()}
        return kind(**fields)  # type: ignore[operator]
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _as_declared(options[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    return value


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line that was cut off by a crash is left out.

    Raises:
      ValueError: a line before the last is no row; it is named.
    """
    return json_files.read_lines(file, cut=True) if file.exists() else []


def _rows_of_rollouts(file: Path) -> list[dict[str, Any]]:
    return json_files.read_lines(file, "rollout", cut=True) if file.exists() else []


def _recorded(file: Path) -> Recorded:
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    rows = _rows_of_rollouts(file)
    for place, row in enumerate(rows):
        if row["rollout"] != place:
            raise ValueError(
                f"{file}: expected the row of rollout {place}, got that of {row['rollout']!r:.20}. "
                "Has another process written to it? Put the file back, or start the run again in "
                "another folder."
            )
    return Recorded(len(rows), sum(bool(line.strip()) for line in lines) > len(rows))


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as Python numbers, and lists of numbers for what is measured of each module."""
    return {name: np.asarray(value).tolist() for name, value in metrics.items()}


def environment() -> dict[str, Any]:
    """Package versions, commit and devices."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "devices": [str(device) for device in jax.devices()],
    }


def _commit() -> str | None:
    """Commit of the checkout that this file is in; None outside one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted names.

    >>> flatten({"mtp": {"rule": "detach"}})
    {'mtp.rule': 'detach'}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json_files.dump(row) + "\n" for row in rows)
