"""The files of a run: configuration, versions, metrics, samples, result."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import types
import typing
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from occ.training.config import TrainConfig
from occ.training.durable import disk
from occ.training.processes import is_first

FREE = ("layout.", "checkpoint_every", "keep_checkpoints", "max_bad_updates")
"""Fields, or beginnings of their names, that a resumed run may change: they change no result."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")


class RunFolder:
    """One run's folder.

        config.json        the resolved configuration; a run is only ever resumed with the same
                           (but for `FREE`: another mesh may go on)
        environment.json   package versions, commit, devices
        metrics.jsonl      a row a rollout; on disk before a checkpoint that follows it
        samples.jsonl      sample completions
        result.json        written once, at the end
        checkpoints/       Orbax

    Of several processes the first writes, and all read.

    Args:
      path: the folder; made if missing.
      config: the run's configuration.

    Raises:
      ValueError: the folder holds a run with another configuration; the fields are named.
    """

    def __init__(self, path: pathlib.Path, config: TrainConfig):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        resolved = json.loads(json.dumps(dataclasses.asdict(config)))
        self._check_same(resolved)
        self._write_json("config.json", resolved)
        if not (path / "environment.json").exists():
            self._write_json("environment.json", environment())

    def _check_same(self, resolved: dict[str, Any]) -> None:
        file = self.path / "config.json"
        if not file.exists():
            return
        before, now = _flatten(json.loads(file.read_text())), _flatten(resolved)
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
                f"run folder {self.path} holds a run with another configuration ({changes}). "
                "Resume it with the same one, or choose another folder."
            )

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run; None while there is none."""
        file = self.path / "result.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result; the end of a run, after its last checkpoint is whole."""
        self._write_json("result.json", result)

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return read_rows(self.path / "metrics.jsonl")

    def keep_rows_before(self, rollout: int) -> None:
        """Drops rows from `rollout` on, which a resumed run writes again, and lines cut short.

        Raises:
          ValueError: of the rollouts before, not each has its row.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.path / name
            kept = [row for row in read_rows(file) if row["rollout"] < rollout]
            if name == "metrics.jsonl" and [row["rollout"] for row in kept] != list(range(rollout)):
                raise ValueError(
                    f"{file} should hold a row for each of the {rollout} rollouts before the "
                    f"newest checkpoint, and holds {len(kept)}. Put the file back, or start the "
                    "run again in another folder."
                )
            if file.exists():
                self._replace(name, _lines(kept))

    def append(self, *rows: dict[str, Any], name: str = "metrics.jsonl") -> None:
        """Adds rows, all in one write."""
        text = _lines(rows)
        if is_first():
            with disk.explained(self.path, len(text)):
                disk.append_text(self.path / name, text)

    def _write_json(self, name: str, value: Any) -> None:
        self._replace(name, json.dumps(value, indent=2) + "\n")

    def _replace(self, name: str, text: str) -> None:
        if is_first():
            with disk.explained(self.path, len(text)):
                disk.replace_text(self.path / name, text)


def read_config(folder: pathlib.Path) -> TrainConfig:
    """The configuration of a run, from its folder.

    Raises:
      ValueError: it holds no run, or one with a field that there is not, for example of another
        version of the project.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} holds no run: it has no config.json.")
    try:
        return _as_declared(TrainConfig, json.loads(file.read_text()))
    except TypeError as error:
        raise ValueError(
            f"{file}: {error}. It was written by another version; environment.json has its commit."
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


def read_rows(file: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line that was cut off by a crash is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


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


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
