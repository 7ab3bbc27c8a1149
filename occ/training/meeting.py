"""Where the processes of a run meet, before JAX's own service takes the same port.

Where its port is taken, or another process does not come, that service ends the process from
inside. Here others are waited for aloud, and what goes wrong is an error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import time

WORD_EVERY = 10.0  # seconds between words of what is waited for
HELLO_SECONDS = 5.0  # for whoever connects to say which process it is
GO = "go"

logger = logging.getLogger(__name__)


def meet(coordinator: str, count: int, index: int, patience: float = 300.0) -> None:
    """Returns when all processes are there.

    Args:
      coordinator: "host:port" of process 0, on which nothing listens.
      count: processes.
      index: of this one, from 0.
      patience: seconds to wait.

    Raises:
      ValueError: the port is taken; or two processes have one number, or another count.
      TimeoutError: not all came; says which did not.
    """
    host, _, port = coordinator.rpartition(":")
    if not port.isdigit() or not 0 <= index < count:
        raise ValueError(
            f"meet: expected host:port and an index from 0 to {count - 1} of {count} processes, "
            f"got {coordinator!r} and {index}."
        )
    if index:
        _go_to(host.strip("[]"), int(port), count, index, time.monotonic() + patience)
    else:
        _wait_for_others(int(port), count, time.monotonic() + patience)


def _wait_for_others(port: int, count: int, deadline: float) -> None:
    absent = set(range(1, count))
    with contextlib.ExitStack() as closing:
        listening = closing.enter_context(_listen(port))
        there: list[socket.socket] = []
        while absent:
            try:
                listening.settimeout(min(WORD_EVERY, max(deadline - time.monotonic(), 0.1)))
                connection = closing.enter_context(listening.accept()[0])
            except TimeoutError:
                words = f"{len(absent)} of {count} processes (numbers {sorted(absent)})"
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{words} did not come to port {port}. Start all with the same command "
                        "and --index 0, 1, ..., and see that they reach this host."
                    ) from None
                logger.warning("waiting for %s at port %d", words, port)
                continue
            came = _hello(connection)
            if came is None:
                continue
            there.append(connection)
            index, expected = came
            if expected != count or index not in absent:
                words = (
                    f"process {index} of {expected} came to meet {count} processes, of which "
                    f"numbers {sorted(absent)} were absent. Each needs an --index of its own, and "
                    "all the same --processes."
                )
                _tell(there, words)
                raise ValueError(words)
            absent.remove(index)
        _tell(there, GO)


def _go_to(host: str, port: int, count: int, index: int, deadline: float) -> None:
    said = time.monotonic()
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=HELLO_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process 0 is not at {host}:{port} ({error}). Is it started, and does "
                    "--coordinator name its host?"
                ) from error
        if time.monotonic() - said > WORD_EVERY:
            said = time.monotonic()
            logger.warning("waiting for process 0 at %s:%d", host, port)
        time.sleep(0.2)
    with connection, connection.makefile("rw") as lines:
        connection.settimeout(max(deadline - time.monotonic(), 1.0))
        lines.write(json.dumps([index, count]) + "\n")
        lines.flush()
        answer = lines.readline().strip()
    if answer != GO:
        raise ValueError(f"process 0 at {host}:{port} ended: {answer or 'it said nothing'}")


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(
            f"port {port} of this host cannot be had ({error}). Is another run's process 0 there? "
            "End it, or give all processes a --coordinator with another port."
        ) from error


def _hello(connection: socket.socket) -> tuple[int, int] | None:
    """Number of the process and how many it expects; None from whoever is none of ours."""
    connection.settimeout(HELLO_SECONDS)
    try:
        with connection.makefile("r") as lines:
            index, count = json.loads(lines.readline(100))
            return int(index), int(count)
    except (OSError, ValueError, TypeError):
        return None


def _tell(connections: list[socket.socket], words: str) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(words.encode() + b"\n")
