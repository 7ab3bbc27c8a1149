"""A server process: started or attached to, asked, and waited for, but not for ever."""

from __future__ import annotations

import atexit
import json
import logging
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from occ.generation.engines.config import EngineConfig
from occ.generation.engines.protocol import EngineError, StaleWeightsError
from occ.generation.engines.server import wire

SERVER = pathlib.Path(__file__).parent / "server"
WORD_EVERY = 30.0  # seconds between words of what is waited for
RETRY_SECONDS = 0.2  # between looks whether a starting server listens
LOG_LINES = 15

logger = logging.getLogger(__name__)


class Connection:
    """The way to one server, which is not started before it is asked for.

    Args:
      config: says where it is, or how to start it.
      command: what to run in place of `server/` with vLLM's environment; for tests.

    Attributes:
      scratch: a folder that both ends see, for weights; it goes with the connection.
    """

    def __init__(self, config: EngineConfig, command: tuple[str, ...] | None = None):
        self._config, self._command = config, command
        self._process: subprocess.Popen | None = None
        self._address = config.address
        self._scratch: pathlib.Path | None = None
        atexit.register(self.close)

    @property
    def scratch(self) -> pathlib.Path:
        """Made at first use, for this user alone."""
        if self._scratch is None:
            place = self._config.folder
            if place is None and pathlib.Path("/dev/shm").is_dir():
                place = "/dev/shm"
            self._scratch = pathlib.Path(tempfile.mkdtemp(prefix="occ-engine-", dir=place))
        return self._scratch

    @property
    def running(self) -> bool:
        """Whether a server was started or attached to, and not found dead."""
        if self._config.address is not None:
            return True
        return self._process is not None and self._process.poll() is None

    def start(self, model: pathlib.Path, options: dict[str, Any]) -> None:
        """Starts a server, or looks for the one that is there; returns when it answers.

        Args:
          model: folder with config.json.
          options: arguments of `vllm.LLM`; a server that is there has its own.

        Raises:
          EngineError: it ended, or did not answer in time; with the end of its log.
        """
        began = time.monotonic()
        if self._config.address is None:
            self._launch(model, options)
        self.ask({"do": "status"}, self._config.start_seconds)
        logger.info("the engine answers after %.0f s", time.monotonic() - began)

    def _launch(self, model: pathlib.Path, options: dict[str, Any]) -> None:
        self._end()  # one that died
        self._address = f"unix:{self.scratch / 'socket'}"
        pathlib.Path(self.scratch / "socket").unlink(missing_ok=True)
        python = sys.executable if self._config.python is None else self._config.python
        command = self._command or (python, str(SERVER))
        arguments = ["--address", self._address, "--model", str(model)]
        arguments += ["--options", json.dumps(options), "--scratch", str(self.scratch)]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, *arguments, "--while-open"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Its workers import by name what lies beside it, and nothing of this process.
                    env={**os.environ, "PYTHONPATH": str(SERVER), "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,  # Ctrl-C ends the run after the rollout in hand
                )
        except OSError as error:
            raise EngineError(
                f"the engine could not be started: {command[0]}: {error.strerror}. Give "
                "engine.python the interpreter of an environment that has vLLM."
            ) from error

    @property
    def _log(self) -> pathlib.Path:
        return self.scratch / "log.txt"

    def ask(
        self, header: dict[str, Any], seconds: float | None = None, **arrays: np.ndarray
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Sends one request and waits for its answer, saying so now and then.

        Args:
          header: "do" names the request; see `service.Service`.
          seconds: the longest to wait; None takes `request_seconds`.
          **arrays: that go with it.

        Raises:
          StaleWeightsError: the server holds other weights than the request is about.
          EngineError: the server died, hung, refused, or was busy all the time.
        """
        limit = self._config.request_seconds if seconds is None else seconds
        deadline = time.monotonic() + limit
        what = header["do"]
        # A server that starts does not listen yet; one that has answered before does, or is gone.
        patience = limit if what == "status" else min(limit, self._config.silence_seconds)
        with self._connect(what, time.monotonic() + patience) as connection:
            try:
                wire.send(connection, {"version": wire.VERSION, **header}, **arrays)
                reply, made = self._reply(connection, what, deadline, limit)
            except TimeoutError as error:
                raise EngineError(
                    f"the engine gave no sign of life for {self._config.silence_seconds:.0f} s "
                    f"within {what!r}: it hangs, or its host is gone. End its process, and give "
                    f"the same command again.{self._end_of_log()}"
                ) from error
            except (OSError, wire.WireError) as error:
                raise EngineError(
                    f"the engine went away within {what!r} ({error}){self._status()}. Mend what "
                    f"ended it, and give the same command again.{self._end_of_log()}"
                ) from error
        if reply.get("kind") == "error":
            kind = StaleWeightsError if reply["type"] == "stale" else EngineError
            raise kind(f"the engine refused {what!r}: {reply['type']}: {reply['message']}")
        return reply, made

    def _connect(self, what: str, deadline: float) -> socket.socket:
        assert self._address is not None
        family, place = wire.address_of(self._address)
        word = time.monotonic() + WORD_EVERY
        while True:
            connection = socket.socket(family, socket.SOCK_STREAM)
            connection.settimeout(self._config.silence_seconds)
            try:
                connection.connect(place)
                return connection
            except OSError as error:
                connection.close()
                ended = self._process is not None and self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise EngineError(
                        f"no engine answers {what!r} at {self._address} ({error})"
                        f"{self._status()}.{self._end_of_log()}"
                    ) from error
            if time.monotonic() > word:
                logger.warning("waiting for the engine at %s to listen", self._address)
                word += WORD_EVERY
            time.sleep(RETRY_SECONDS)

    def _reply(
        self, connection: socket.socket, what: str, deadline: float, limit: float
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        word = time.monotonic() + WORD_EVERY
        while True:
            reply, made = wire.receive(connection)
            if reply.get("kind") != "busy":
                return reply, made
            now, doing = time.monotonic(), reply.get("with")
            if now > deadline:
                raise EngineError(
                    f"the engine has not done {what!r} in {limit:.0f} s: it is at {doing!r}. Wait "
                    "for whoever else uses it, or raise engine.request_seconds (start_seconds)."
                    f"{self._end_of_log()}"
                )
            if now > word:
                logger.warning("waiting for the engine to %s; it is at %r", what, doing)
                word += WORD_EVERY

    def _status(self) -> str:
        code = None if self._process is None else self._process.poll()
        return "" if code is None else f"; its process ended with status {code}"

    def _end_of_log(self) -> str:
        if self._process is None or not self._log.exists():
            return ""
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\nThe end of its log:\n" + "\n".join(f"  {line}" for line in lines)

    def close(self) -> None:
        """Ends the process, if it was started here, and deletes what lies in `scratch`."""
        self._end()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()  # at which it ends
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
