"""One process at a time in a folder, which is free again however that process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from occ import json_files
from occ.buckets import Path, is_bucket

if TYPE_CHECKING:
    from occ.training.durable.bucket_lock import BucketLock

NAME = "lock.json"
BEAT = 5.0  # seconds between signs of life of the process that has a folder
SILENCE = 20.0  # seconds without one, after which a process on another host is taken for dead
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(RuntimeError):
    """Another process works in the folder; the message says which."""


class FolderLock:
    """Keeps other processes out of a folder until it is closed.

    lock.json in the folder names process and host. The operating system lets go of it when the
    process ends, so that what a killed one left is taken over at once on the same host. From
    another host, which that system may not know of, the file is watched: it is touched every
    `BEAT` seconds by who has it.

    Args:
      folder: that exists.

    Raises:
      LockedError: another process has it, or this one, by another `FolderLock`.
    """

    def __init__(self, folder: pathlib.Path):
        self._file = folder / NAME
        self._ended = threading.Event()
        self._descriptor = _take(self._file)
        mine = {"process": os.getpid(), "host": socket.gethostname()}
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, (json_files.dump(mine) + "\n").encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def check(self) -> None:
        """Nothing: while this process is there, the operating system lets nobody else have it."""

    def close(self) -> None:
        """Lets others in."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._file.unlink(missing_ok=True)  # before it is let go, so that nobody else has it yet
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def take(folder: Path) -> FolderLock | BucketLock:
    """The lock of a folder, local or in a bucket.

    Raises:
      LockedError: another process has it, or this one.
      ValueError: there is no such bucket.
    """
    if not is_bucket(folder):
        return FolderLock(folder)
    from occ.training.durable.bucket_lock import BucketLock

    return BucketLock(folder / NAME, _refusal)


def _take(file: pathlib.Path) -> int:
    """A descriptor of the file, which nobody else has."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            owner = read_owner(os.pread(descriptor, 4096, 0))
            locked = _lock(descriptor)
            if locked is False or (owner and _lives(file, owner, sure=locked is not None)):
                raise _refusal(file, owner)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had the file has deleted it in between


def _lock(descriptor: int) -> bool | None:
    """Whether the operating system lets us have it; None where it has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def _lives(file: pathlib.Path, owner: dict[str, Any], *, sure: bool) -> bool:
    """Whether the process that is named in the file may still be there.

    Args:
      file: of the lock.
      owner: what it says.
      sure: the operating system's lock is ours, so that no process on this host has it.
    """
    if owner.get("host") == socket.gethostname():
        return not sure and is_running(owner.get("process"))
    seen, deadline = _touched(file), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(BEAT, SILENCE) / 5)
        if _touched(file) != seen:
            return True
    return False


def _touched(file: pathlib.Path) -> int:
    with file.open("rb") as opened:  # what a network filesystem remembers of a file may be old
        return os.fstat(opened.fileno()).st_mtime_ns


def is_running(process: Any) -> bool:
    """Whether this machine has a process of this number, which may be anything that a file held."""
    try:
        os.kill(int(process), 0)
    except (TypeError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def read_owner(content: bytes) -> dict[str, Any]:
    """Who holds a lock, as its file says; {} of one that was made a moment ago, or is damaged."""
    try:
        owner = json_files.parse(content, "lock")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _refusal(file: Path, owner: dict[str, Any]) -> LockedError:
    process, host = owner.get("process", "unknown"), owner.get("host", "unknown")
    return LockedError(
        f"{file.parent} is in use by process {process} on host {host}. Wait for it or end it, and "
        "give the same command again; or choose another folder."
    )
