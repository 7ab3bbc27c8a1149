"""What a process says and does while a bucket does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

FIRST_DELAY = 1.0  # seconds before the second try; then twice as long each time
LONGEST_DELAY = 10.0  # seconds; shorter than the silence after which a lock is taken over
PATIENCE = 3600.0  # seconds without an answer, after which a request is given up

Reply = TypeVar("Reply")


class UnreachableError(RuntimeError):
    """A bucket has not answered for too long; no OSError, which readers take for a missing file."""


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # of a terminal that is gone
        print(line, file=sys.stderr, flush=True)


class Outage:
    """Speaks once for all requests that wait at one time.

    Args:
      say: takes a line; None is standard error.
    """

    def __init__(self, say: Callable[[str], None] | None = None):
        self._say = _to_stderr if say is None else say
        self._lock = threading.Lock()
        self._since: float | None = None  # of the first request without an answer
        self._quiet_until = 0.0

    def failed(self, where: str, reason: BaseException, delay: float) -> None:
        """A request had no answer, and waits for `delay` seconds."""
        now = time.monotonic()
        with self._lock:
            self._since = now if self._since is None else self._since
            if now < self._quiet_until:
                return
            self._quiet_until = now + delay
        words = f"{type(reason).__name__}: {reason}".split("\n")[0][:200]
        self._say(f"waiting for {where}, which does not answer ({words}); next try in {delay:g} s")

    def answered(self, where: str) -> None:
        """A request was answered."""
        if self._since is None:
            return
        with self._lock:
            since, self._since, self._quiet_until = self._since, None, 0.0
        if since is not None:
            self._say(f"{where} answers again after {time.monotonic() - since:.0f} s; going on")


OUTAGE = Outage()
"""Of this process."""


async def patiently(
    request: Callable[[], Awaitable[Reply]],
    where: str,
    transient: Callable[[BaseException], bool],
    outage: Outage = OUTAGE,
) -> Reply:
    """The reply to a request, which is made until there is one.

    Args:
      request: makes it once.
      where: it goes to, for people.
      transient: whether an error means that there was no answer; others are raised.
      outage: is told.

    Raises:
      UnreachableError: there was none for `PATIENCE` seconds.
    """
    began, delay = time.monotonic(), FIRST_DELAY
    while True:
        try:
            reply = await request()
        except Exception as error:
            if not transient(error):
                outage.answered(where)
                raise
            waited = time.monotonic() - began
            if waited > PATIENCE:
                raise UnreachableError(
                    f"{where} has not answered for {waited:.0f} s ({type(error).__name__}: "
                    f"{error}). What was saved before is whole: give the same command again when "
                    "it answers."
                ) from error
            outage.failed(where, error, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)
            continue
        outage.answered(where)
        return reply
