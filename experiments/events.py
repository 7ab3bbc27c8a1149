"""TensorBoard events of a run, and the guard: what is logged never blocks or ends training."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from typing import Any, Protocol

import numpy as np
import tqdm
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from occ.buckets import Path


class Logger(Protocol):
    """What takes rows of metrics: a file, or a service elsewhere."""

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes a row, which has its "rollout"."""

    def close(self) -> None:
        """Ends it."""


class EventFile:
    """A file of TensorBoard events, on disk after each row.

    tensorboardX's SummaryWriter writes in a thread of its own, which dies on a full disk; then it
    waits for it for ever. This one has neither thread nor queue, and raises.

    Args:
      folder: for the file.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))

    def __call__(self, row: dict[str, Any]) -> None:
        """Writes every number of a row, and every entry of its lists."""
        for name, value in scalars(row).items():
            self._write(Event(summary=summary.scalar(name, value), step=row["rollout"]))
        self._file.flush()

    def close(self) -> None:
        """Closes the file, even where what it still holds cannot be written."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())


class Guarded:
    """A logger that can neither block nor end what is logged.

    It is called in a thread of its own. After its first error, or where it does not keep up, it is
    given up with one warning, and later rows are dropped.

    Args:
      logger: makes the logger; called in that thread too.
      name: of what is logged to, for the warning.
      waiting: rows that may wait for it.
      patience: seconds that `close` waits for it.
    """

    def __init__(self, logger: Any, name: str = "", *, waiting: int = 256, patience: float = 10.0):
        self._where = f"logging to {name}" if name else "logging"
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(waiting)
        self._patience = patience
        self._error: Exception | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._log, args=(logger,), daemon=True)
        self._thread.start()

    def __call__(self, row: dict[str, Any]) -> None:
        """Hands a row on, and returns at once."""
        self._put(row)

    def close(self) -> None:
        """Waits for what was handed on, but no longer than its patience."""
        self._put(None)
        if not self._given_up:
            self._thread.join(self._patience)
            if self._thread.is_alive():
                self._give_up(f"it did not end within {self._patience:g} s")
            elif self._error is not None:
                self._give_up(repr(self._error))

    def _put(self, row: dict[str, Any] | None) -> None:
        if self._given_up:
            return
        if self._error is not None:
            self._give_up(repr(self._error))
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._give_up(f"{self._rows.maxsize} rows wait for it")

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        text = f"{self._where} was given up ({reason}); training goes on, metrics.jsonl has all"
        with contextlib.suppress(OSError):  # of a terminal that is gone
            tqdm.tqdm.write(text, file=sys.stderr)

    def _log(self, make: Any) -> None:
        with contextlib.ExitStack() as closing:
            try:
                logger: Logger = make()
                closing.callback(self._close, logger)
                while (row := self._rows.get()) is not None:
                    logger(row)
            except Exception as error:  # whatever a logger raises, training must not end for it
                self._error = error

    def _close(self, logger: Logger) -> None:
        try:
            logger.close()
        except Exception as error:  # as above
            self._error = self._error if self._error is not None else error


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Every number of a row, and every entry of its lists.

    >>> scalars({"reward": 0.5, "occ/coefficient": [0.1, 0.2]})
    {'reward': 0.5, 'occ/coefficient/1': 0.1, 'occ/coefficient/2': 0.2}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        array = np.asarray(value, np.float64)
        entries = enumerate(array.ravel(), start=1)
        found |= {f"{name}/{i}" if array.ndim else name: float(x) for i, x in entries}
    return found
