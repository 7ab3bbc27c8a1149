"""A function of text in worker processes that can be killed, with bounds on what a call may use.

This file is also the program that a worker runs (`_serve`). A worker is a bare interpreter: it
loads one file by its path and imports neither this package nor the program that asked, so neither
jax nor a copy of the caller's main module is in it, as they would be with `multiprocessing`.
Requests and replies are JSON, so this process never unpickles what a worker sends.

A call that exceeds its bounds, raises or kills its worker is a `Failure` of that call alone; the
worker is replaced. Linux only: the bounds are the kernel's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing.connection as mp_connection
import os
import pathlib
import queue
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

MIB = 2**20
MAX_REPLY = MIB  # bytes; a longer reply is none
PROGRAM_REFUSED = 71  # exit status of a worker that tried what `_guard` forbids
# What a worker finds in its environment: where to find Python and packages, and no secrets.
PASSED_ON = ("LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on a worker.

    Attributes:
      cpu_seconds: processor time a call; it does not depend on what else the machine does, so it
        is the bound that should bite.
      wall_seconds: a call, for one that waits without computing.
      memory_mib: address space of a worker, its interpreter and modules included.
      batch_seconds: all calls of one `map` together, whatever they are.
      start_seconds: until a worker has loaded its function.
      calls: before a worker is replaced; caches of the libraries that it uses only grow.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 30.0
    memory_mib: int = 1024
    batch_seconds: float = 120.0
    start_seconds: float = 60.0
    calls: int = 2000

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"Limits: {field.name} must be positive, got {getattr(self, field.name)}."
                )


@dataclasses.dataclass(frozen=True)
class Failure:
    """A call without a result.

    Attributes:
      reason: "time" of computing ran out, it "waited" without computing, the function "raised",
        the worker "died", none could "start", or its "turn" did not come in the batch's time.
      detail: the exception, exit status or message, for logs.
    """

    reason: Literal["time", "waited", "raised", "died", "start", "turn"]
    detail: str = ""


class WorkerPool:
    """Calls one function in several worker processes.

    Args:
      source: file that defines the function; loaded by path, so it must not import this package.
        Its optional `PROGRAMS`, a regular expression, says which texts may be compiled in a worker
        for the libraries that do so; without it none may. Its optional function `prepare` is called
        before a worker is confined, for what libraries import or make at the first use.
      function: its name; takes strings, returns what JSON can hold.
      workers: processes.
      limits: bounds on each of them.

    Raises:
      ValueError: `workers` is not positive, or there is no such file.
      RuntimeError: a worker could not load the function; with what it wrote.
    """

    def __init__(
        self, source: pathlib.Path, function: str, *, workers: int = 2, limits: Limits | None = None
    ):
        if workers < 1:
            raise ValueError(f"WorkerPool: workers must be at least 1, got {workers}.")
        if not source.is_file():
            raise ValueError(f"WorkerPool: expected the file of {function!r}, found no {source}.")
        self._limits = limits = Limits() if limits is None else limits
        self._workers = [_Worker(source.resolve(), function, limits) for _ in range(workers)]
        self._close = weakref.finalize(self, _stop, self._workers)
        # The worker used last is asked first, so that few calls keep few workers warm.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        failure = self._workers[0].start()
        if failure is not None:
            raise RuntimeError(
                f"WorkerPool: a worker could not load {function!r} from {source}: {failure.detail}"
            )

    def map(self, requests: Sequence[Sequence[str]], *, seconds: float | None = None) -> list[Any]:
        """Results of the function, in the order of the requests.

        Args:
          requests: arguments of each call.
          seconds: after which no call begins any more, and none goes on; default
            `Limits.batch_seconds`.

        Returns:
          For each request the result, or a `Failure`.

        Raises:
          ValueError: the pool is closed.
        """
        if not self._close.alive:
            raise ValueError("WorkerPool: closed; make a new one.")
        seconds = self._limits.batch_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        if min(len(self._workers), len(requests)) == 1:
            return [self._call(request, deadline) for request in requests]
        with concurrent.futures.ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(self._call, requests, itertools.repeat(deadline)))

    @property
    def replaced(self) -> int:
        """Workers that were replaced since the start, for whatever reason."""
        return sum(max(worker.starts - 1, 0) for worker in self._workers)

    def close(self) -> None:
        """Ends the workers; further calls of `map` raise."""
        self._close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, request: Sequence[str], deadline: float) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(request, deadline)
        finally:
            self._idle.put(worker)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()


class _Worker:
    """One place in the pool: a process, or none until it is next needed."""

    def __init__(self, source: pathlib.Path, function: str, limits: Limits):
        self._arguments = [str(source), function, json.dumps(dataclasses.asdict(limits))]
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: mp_connection.Connection | None = None
        self._calls = 0
        self.starts = 0

    def start(self) -> Failure | None:
        """Starts a process; returns why that failed."""
        ours, theirs = mp_connection.Pipe()
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        with theirs, tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    # -P: the modules beside this file must not shadow packages.
                    [sys.executable, "-PB", __file__, str(theirs.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=[theirs.fileno()],
                    cwd="/",
                    # One order of hashing in all workers: one result, whichever takes the call.
                    env={**environment, "PYTHONHASHSEED": "0"},
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                return Failure("start", str(error))
            theirs.close()  # else a worker that dies would leave the pipe open
            self._process, self._connection, self._calls = process, ours, 0
            self.starts += 1
            try:
                if ours.poll(self._limits.start_seconds):
                    ours.recv_bytes(MAX_REPLY)
                    return None
                detail = f"not ready after {self._limits.start_seconds} s"
            except (EOFError, OSError):
                detail = "it ended"
            self.stop()
            errors.seek(0)
            return Failure("start", f"{detail}\n{errors.read(MAX_REPLY).decode(errors='replace')}")

    def call(self, request: Sequence[str], deadline: float) -> Any:
        """The function's result or a `Failure`.

        What a used worker fails at is tried once more in a fresh one, so that a failure is never
        owed to the calls before it. Time is not: it is not what they could have used up.
        """
        if self._process is not None and (
            self._calls >= self._limits.calls or self._process.poll() is not None
        ):
            self.stop()
        fresh = self._process is None
        result = self._call_once(request, deadline)
        if isinstance(result, Failure) and result.reason in ("raised", "died") and not fresh:
            self.stop()
            result = self._call_once(request, deadline)
        return result

    def _call_once(self, request: Sequence[str], deadline: float) -> Any:
        if time.monotonic() >= deadline:
            return Failure("turn", "the time of its batch had run out before")
        if self._process is None:
            failure = self.start()
            if failure is not None:
                return failure
        assert self._connection is not None
        self._calls += 1
        left = deadline - time.monotonic()
        try:
            self._connection.send_bytes(json.dumps(list(request)).encode())
            if self._connection.poll(min(self._limits.wall_seconds, max(left, 0.0))):
                reply = json.loads(self._connection.recv_bytes(MAX_REPLY))
                return reply["result"] if "result" in reply else Failure("raised", reply["raised"])
        except (EOFError, OSError, ValueError):
            status = self.stop()
            if status == -signal.SIGPROF:
                return Failure("time", f"more than {self._limits.cpu_seconds} s of computing")
            return Failure("died", f"exit status {status}")
        self.stop()
        if left < self._limits.wall_seconds:
            return Failure("turn", "the time of its batch ran out")
        return Failure("waited", f"more than {self._limits.wall_seconds} s")

    def stop(self) -> int | None:
        """Kills the process, and whatever it may have started; returns its exit status."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return None
        connection.close()
        try:
            # A worker that is ending by itself keeps its own status.
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            process.kill()
        status = process.wait()
        with contextlib.suppress(ProcessLookupError):  # nothing is left of its session
            os.killpg(process.pid, signal.SIGKILL)
        return status


# -- in the worker ----------------------------------------------------------------------------

# By these a function says that it could not judge its arguments. Any other exception ends the
# worker: after a MemoryError, say, nothing in it is to be relied on.
_RAISED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# The only events of Python's audit log that may occur once the function is loaded. Libraries
# import parts of themselves late.
_HARMLESS = frozenset(
    [
        "array.__new__",
        "builtins.id",
        "code.__new__",
        "exec",  # of code that was compiled, which is another event, or is a module's
        "import",
        "marshal.load",
        "marshal.loads",
        "object.__delattr__",
        "object.__getattr__",
        "object.__setattr__",
        "os.listdir",
        "os.scandir",
        "setopencodehook",
        "signal.setitimer",
        "sys._getframe",
        "sys._getframemodulename",
        "sys.excepthook",
        "sys.unraisablehook",
    ]
)


def _guard(programs: re.Pattern[str] | None) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that ends the process at what computing with text does not need.

    No text becomes a program unless it is a module's file or matches `programs`; nothing is opened
    but for reading; and there are no processes, sockets or foreign functions. It ends the process,
    since an exception would be caught by some library and pass for a wrong answer.
    """

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _HARMLESS:
            return
        if event == "open" and not arguments[2] & os.O_ACCMODE:
            return
        if event == "compile":
            source, name = arguments
            if os.path.isabs(os.fsdecode(name or "")):
                return
            text = source.decode() if isinstance(source, bytes) else source
            if programs is not None and isinstance(text, str) and programs.fullmatch(text):
                return
        os._exit(PROGRAM_REFUSED)

    return refuse


def _confine(memory_mib: int, programs: re.Pattern[str] | None) -> None:
    """Gives up, for good, what computing with text does not need."""
    for bound, value in [
        (resource.RLIMIT_AS, memory_mib * MIB),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ]:
        resource.setrlimit(bound, (value, value))
    sys.addaudithook(_guard(programs))


def _load(source: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("worker_function", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(descriptor: str, source: str, name: str, limits_json: str) -> None:
    """Answers requests until the other end is closed."""
    limits = Limits(**json.loads(limits_json))
    connection = mp_connection.Connection(int(descriptor))
    module = _load(source)
    function = getattr(module, name)
    getattr(module, "prepare", lambda: None)()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the start is over; libraries may warn
    _confine(limits.memory_mib, getattr(module, "PROGRAMS", None))
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        # Nobody handles these signals, so the kernel ends the process, even inside a long operation
        # of the interpreter. The second is for a process that outlives the one that asked.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, 2 * limits.wall_seconds)
        try:
            reply = {"result": function(*json.loads(request))}
        except _RAISED as error:
            reply = {"raised": f"{type(error).__name__}: {error}"[:1000]}
        connection.send_bytes(json.dumps(reply).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
