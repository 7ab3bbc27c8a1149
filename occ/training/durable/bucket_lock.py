"""One process at a time in a folder of a bucket, which is free again when that process is silent.

lock.json is an object that one process creates on condition that there is none, and from then on
writes again every `BEAT` seconds on condition that it is still its own. Whoever finds one watches
it: one that nobody writes for `SILENCE` seconds is taken over, on condition that it is the one that
was watched. Where the process was one of this machine, and has ended, there is nothing to watch.

A process that could not write its signs of life for so long (it slept, or the network was gone)
finds the lock changed, and so do its appends (`occ.buckets.store.append`).
"""

from __future__ import annotations

import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from occ import json_files
from occ.buckets import Path, store
from occ.training.durable.lock import is_running, read_owner

BEAT = 5.0  # seconds between signs of life of the process that has a folder
SILENCE = 30.0  # seconds without one, after which it is taken for dead


class BucketLock:
    """An object that this process has, until it is closed.

    Args:
      file: lock.json.
      refusal: makes the error for a lock of somebody else, whom it is told.

    Raises:
      RuntimeError: `refusal`'s, where another process has it, or this one, by another lock.
    """

    def __init__(self, file: Path, refusal: Callable[[Path, dict[str, Any]], RuntimeError]):
        store.check_bucket(file.parent)
        self._file = file
        self._refusal = refusal
        self._ended = threading.Event()
        self._lost: dict[str, Any] | None = None
        self._owner: dict[str, Any] = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "lock": uuid.uuid4().hex,
        }
        self._beats = 0
        self._generation = self._take()
        _MINE.add(self._owner["lock"])
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Whether it is still ours.

        Raises:
          RuntimeError: `refusal`'s; somebody else has taken it over.
        """
        if self._lost is not None:
            raise self._refusal(self._file, self._lost)

    def close(self) -> None:
        """Lets others in."""
        if self._ended.is_set():
            return
        self._ended.set()
        _MINE.discard(self._owner["lock"])
        self._thread.join(BEAT)
        if self._lost is None and not self._thread.is_alive():  # else the bucket does not answer
            store.delete(self._file, self._generation)

    def _take(self) -> int:
        while True:
            found = store.read(self._file)
            if found is not None:
                owner = read_owner(found.content)
                if owner.get("lock") in _MINE or self._lives(found, owner):
                    raise self._refusal(self._file, owner)
            generation = 0 if found is None else found.generation
            mine = store.write(self._file, self._content(), generation)
            if mine is not None:
                return mine

    def _content(self) -> bytes:
        return (json_files.dump({**self._owner, "beats": self._beats}) + "\n").encode()

    def _lives(self, found: store.Object, owner: dict[str, Any]) -> bool:
        """Whether the process that wrote a lock may still be there."""
        here = owner.get("machine") == self._owner["machine"] is not None
        # One with our own number, and none of our locks, was there before us.
        if here and (owner.get("process") == os.getpid() or not is_running(owner.get("process"))):
            return False
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(min(BEAT, SILENCE) / 5)
            now = store.read(self._file)
            if now is None:
                return False
            if now.generation != found.generation:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._beats += 1
            try:
                generation = store.write(self._file, self._content(), self._generation)
                if generation is None and store.read(self._file) is None:  # deleted by hand
                    generation = store.write(self._file, self._content(), 0)
                if generation is None:
                    found = store.read(self._file)
                    self._lost = {} if found is None else read_owner(found.content)
                    return
            except Exception:  # the run's own requests say what is wrong
                continue
            self._generation = generation


_MINE: set[str] = set()
"""Locks that this process has."""


def _machine() -> str | None:
    """This boot of this machine, and the numbers of processes that it has; None if unknown.

    Names of hosts are no help: many machines in the world have the same.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
