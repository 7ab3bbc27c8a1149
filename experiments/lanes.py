"""Pieces of work in several threads of this process, which so share what is compiled."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from experiments.progress import Interrupt

POLL_SECONDS = 0.2  # between looks at signals, which only the main thread has
NAME = "lane"


def in_lanes(work: Sequence[Callable[[], object]], lanes: int, wish: Interrupt) -> bool:
    """Does the work in its order, so many pieces at one time.

    Args:
      work: returns False where it stopped before its end.
      lanes: threads; they end with the process.
      wish: to stop, which leaves what has not begun. A piece that fails makes it.

    Returns:
      Whether all was done.

    Raises:
      BaseException: the first that a piece of work raised, when the others have ended; but not
        KeyboardInterrupt by which it obeyed the wish.
    """
    waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    for piece in work:
        waiting.put(piece)
    failed: list[BaseException] = []
    left = threading.Event()

    def lane() -> None:
        while not wish() and not left.is_set():
            try:
                piece = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done = piece() is not False
            except BaseException as error:  # to be raised where somebody sees it
                done = False
                if not (isinstance(error, KeyboardInterrupt) and wish()):
                    failed.append(error)
                    wish.wished = True
            if not done:
                left.set()

    threads = [threading.Thread(target=lane, name=NAME, daemon=True) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
    if failed:
        raise failed[0]
    return waiting.empty() and not left.is_set()


def leave(status: int) -> NoReturn:
    """Ends the process, at once if lanes are at work: a second Ctrl-C waits for none of them."""
    if any(thread.name == NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
