"""A saved starting point: parameters after the warm start, with what decided them."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import numpy as np

from occ import json_files
from occ.training.durable import disk
from occ.training.durable.checkpoints import Checkpoints, set_aside
from occ.training.durable.history import History
from occ.training.processes import from_first, is_first, on_first


def save_start(folder: pathlib.Path, decides: dict[str, Any], start: tuple[Any, Any]) -> None:
    """Saves (params, rest) under a key made of all settings that decided them.

    It is written beside and renamed: what another process finds there is whole.

    Args:
      folder: where starting points are kept.
      decides: JSON-like settings.
      start: (params, rest).

    Raises:
      DiskFullError: it could not be written; nothing of it is left.
    """
    key = _key(decides)
    writer = int(from_first(np.array(os.getpid(), np.int32)))
    beside = folder.absolute() / f"{key}.{writer}.new"
    try:
        with Checkpoints(beside, owner=key) as checkpoints:
            checkpoints.save(0, {"params": start[0], "rest": start[1]}, History())
        on_first(lambda: _publish(beside, folder.absolute() / key, decides))
    finally:
        if is_first():
            shutil.rmtree(beside, ignore_errors=True)


def load_start(
    folder: pathlib.Path, decides: dict[str, Any], like: tuple[Any, Any]
) -> tuple[Any, Any] | None:
    """The starting point that these settings made before, or None.

    One that cannot be read, or is not what was saved, is reported and renamed.

    Args:
      folder: where starting points are kept.
      decides: JSON-like settings.
      like: (params, rest) of the shapes wanted.
    """
    key = _key(decides)
    target = folder.absolute() / key
    if not target.is_dir():
        return None
    try:
        with Checkpoints(target, owner=key) as checkpoints:
            saved = checkpoints.read({"params": like[0], "rest": like[1]}).state
    except ValueError as error:
        renamed = set_aside(target)
        warnings.warn(
            f"starting point {target} cannot be used ({error}); it is now {renamed.name}, and the "
            "starting point is made again.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return saved["params"], saved["rest"]


def _key(decides: dict[str, Any]) -> str:
    text = json.dumps(decides, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _publish(beside: pathlib.Path, target: pathlib.Path, decides: dict[str, Any]) -> None:
    with disk.explained(target.parent, 0):
        disk.replace(beside / "decides.json", json_files.dump(decides, indent=2) + "\n")
        if not target.exists():  # another process may have made the same one in the meantime
            beside.rename(target)
