"""A saved starting point: parameters after the warm start, with what decided them.

FOLDER/KEY/           Orbax, and decides.json; KEY is a digest of what decided it
FOLDER/KEY.json       in a bucket, written last: which folder it is, and what decided it
FOLDER/KEY.NUMBER/    in a bucket, Orbax
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from typing import Any

import numpy as np

from occ import json_files
from occ.buckets import Path, absolute, is_bucket
from occ.training.durable import disk
from occ.training.durable.checkpoints import Checkpoints, set_aside
from occ.training.durable.history import History
from occ.training.processes import from_first, is_first, on_first


def save_start(folder: Path, decides: dict[str, Any], start: tuple[Any, Any]) -> None:
    """Saves (params, rest) under a key made of all settings that decided them.

    It is written beside and renamed, or in a bucket named: what another process finds is whole.

    Args:
      folder: where starting points are kept, local or in a bucket.
      decides: JSON-like settings.
      start: (params, rest).

    Raises:
      DiskFullError: it could not be written; nothing of it is left.
    """
    key = _key(decides)
    # Hosts that share a bucket have processes of one number.
    number = secrets.randbits(31) if is_bucket(folder) else os.getpid()
    writer = int(from_first(np.array(number, np.int32)))
    beside = absolute(folder) / f"{key}.{writer}{'' if is_bucket(folder) else '.new'}"
    published = False

    def publish() -> None:
        nonlocal published
        published = _publish(beside, absolute(folder) / key, decides)

    try:
        with Checkpoints(beside, owner=key) as checkpoints:
            checkpoints.save(0, {"params": start[0], "rest": start[1]}, History())
        on_first(publish)
    finally:
        if is_first() and is_bucket(beside):
            if not published:
                beside.rmtree(missing_ok=True)
        elif is_first():
            shutil.rmtree(beside, ignore_errors=True)


def load_start(
    folder: Path, decides: dict[str, Any], like: tuple[Any, Any]
) -> tuple[Any, Any] | None:
    """The starting point that these settings made before, or None.

    One that cannot be read, or is not what was saved, is reported and renamed.

    Args:
      folder: where starting points are kept.
      decides: JSON-like settings.
      like: (params, rest) of the shapes wanted.
    """
    key = _key(decides)
    target = _place(absolute(folder) / key)
    if target is None or not target.is_dir():
        return None
    try:
        with Checkpoints(target, owner=key) as checkpoints:
            saved = checkpoints.read({"params": like[0], "rest": like[1]}).state
    except ValueError as error:
        renamed = set_aside(target)
        if is_bucket(folder) and is_first():
            _name(absolute(folder) / key).unlink(missing_ok=True)
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


def _name(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _place(target: Path) -> Path | None:
    """The folder of a starting point; None where a bucket names none."""
    if not is_bucket(target):
        return target
    name = _name(target)
    if not name.exists():
        return None
    return target.with_name(json_files.read_object(name, "folder")["folder"])


def _publish(beside: Path, target: Path, decides: dict[str, Any]) -> bool:
    """Lets others find it; whether they do."""
    if is_bucket(target):
        from occ.buckets import store

        named = json_files.dump({"folder": beside.name, "decides": decides}, indent=2) + "\n"
        return store.write(_name(target), named.encode(), 0) is not None
    with disk.explained(target.parent, 0):
        disk.replace(beside / "decides.json", json_files.dump(decides, indent=2) + "\n")
        if not target.exists():  # another process may have made the same one in the meantime
            beside.rename(target)
    return True
