"""Files of a bucket on this host's disk, for libraries that map files into memory or write them."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from typing import Any

from occ import json_files
from occ.buckets import store
from occ.buckets.paths import Path

FOLDER = "OCC_STAGING"
"""Environment variable: where copies are kept; ~/.cache/occ-jax/buckets without it."""

RECORD = ".generations.json"


def stage(source: Path) -> pathlib.Path:
    """A local copy of an object, or of all objects of a folder.

    Only what changed in the bucket since the last time is copied; what was deleted there is deleted
    here. A copy's time is that of the object, the same on every host.

    Args:
      source: in a bucket.

    Raises:
      ValueError: there is nothing.
    """
    infos = store.listing(source)
    if not infos:
        raise ValueError(f"{source}: there is no such object or folder in the bucket.")
    target = staging_folder() / str(source).removeprefix("gs://")
    whole = str(source).removeprefix("gs://")
    folder = target if whole not in infos else target.parent
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / (f".{target.name}{RECORD}" if folder != target else RECORD)
    known = _known(record)
    wanted = {}
    for name, info in infos.items():
        local = target if name == whole else target / name.removeprefix(whole + "/")
        relative = local.relative_to(folder).as_posix()
        wanted[relative] = str(info["generation"])
        if known.get(relative) != wanted[relative] or not local.is_file():
            _copy(store.named(name), local, info)
    for gone in known.keys() - wanted.keys():
        (folder / gone).unlink(missing_ok=True)
    beside = record.with_name(f"{record.name}.{os.getpid()}")
    beside.write_text(json.dumps(wanted, indent=2) + "\n")
    beside.replace(record)
    return target


def staging_folder() -> pathlib.Path:
    """Where copies are kept."""
    given = os.environ.get(FOLDER)
    return pathlib.Path(given) if given else pathlib.Path.home() / ".cache" / "occ-jax" / "buckets"


def publish(source: pathlib.Path, target: Path, last: str) -> None:
    """Copies a local folder to a bucket, file by file.

    Args:
      source: the folder, without further folders.
      target: in the bucket.
      last: the file without which readers do not take the folder for whole.
    """
    names = sorted(file.name for file in source.iterdir())
    for name in [*(name for name in names if name != last), last]:
        store.upload(source / name, target / name)


def _copy(source: Path, local: pathlib.Path, info: dict[str, Any]) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(prefix=local.name, dir=local.parent)
    os.close(descriptor)
    try:
        store.download(source, beside)
        found = os.path.getsize(beside)
        if found != info["size"]:
            raise ValueError(f"{source}: expected {info['size']} bytes, got {found}. Try again.")
        changed = info["mtime"].timestamp()
        os.utime(beside, (changed, changed))
        os.replace(beside, local)
    finally:
        pathlib.Path(beside).unlink(missing_ok=True)


def _known(record: pathlib.Path) -> dict[str, str]:
    try:
        return json_files.read_object(record)
    except (FileNotFoundError, ValueError):  # cut short: all is copied again
        return {}
