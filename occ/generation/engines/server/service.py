"""Answers the requests of a run, one at a time, around any model that can load and generate.

Every connection carries one request. While it waits or is worked on, the client hears so every
`BEAT_SECONDS`: what is silent for long is dead.
"""

from __future__ import annotations

import os
import pathlib
import queue
import socket
import threading
import traceback
from typing import Any, Protocol

import numpy as np
import wire

BEAT_SECONDS = 1.0
Arrays = dict[str, np.ndarray]


class StaleError(Exception):
    """The weights are not those that the client means."""


class Model(Protocol):
    """What is served."""

    def load(self, folder: str) -> dict[str, Any]:
        """Takes in the weights of a folder; "wrong" lists what it does not hold afterwards."""

    def generate(self, sampling: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Responses to prompts; see `Service`."""

    def sleep(self) -> None:
        """Frees the device until `wake`."""

    def wake(self) -> None:
        """Takes it again; weights need not have survived."""


class Service:
    """Listens at an address, and works in the thread that calls `run`.

    Requests, by "do":

        "load": folder, digest              -> the model's report
        "generate": digest, sampling; tokens int32 [sum of lengths], lengths int32 [N],
                    prompt_of int32 [B], seeds int64 [B]
                                            -> tokens int32 and log_prob float32 [sum of lengths],
                                               lengths int32 [B], finished bool [B]; speculation
        "status"                            -> what is held, and the process
        "sleep", "wake"

    Args:
      model: that is served.
      address: "unix:PATH" or "HOST:PORT".
    """

    def __init__(self, model: Model, address: str):
        self.model = model
        self.digest: str | None = None
        self._work: queue.Queue[_Job | None] = queue.Queue()
        self._doing = "nothing"
        family, self._place = wire.address_of(address)
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind(self._place)
        self._listener.listen()

    def run(self) -> None:
        """Answers until `stop`."""
        threading.Thread(target=self._accept, daemon=True).start()
        while (job := self._work.get()) is not None:
            self._doing = str(job.header.get("do"))
            try:
                job.answer(*self._answer(job.header, job.arrays))
            except Exception as error:  # whatever vLLM raises: the client is told, and decides
                traceback.print_exc()
                kind = "stale" if isinstance(error, StaleError) else type(error).__name__
                job.answer({"kind": "error", "type": kind, "message": str(error)}, {})
            self._doing = "nothing"

    def stop(self) -> None:
        """Ends `run` after the request in hand."""
        self._work.put(None)
        self._listener.close()

    def _answer(self, header: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        do = header.get("do")
        if header.get("version") != wire.VERSION:
            raise ValueError(
                f"the client speaks version {header.get('version')} of the protocol, this server "
                f"{wire.VERSION}. Start the server from the client's own checkout."
            )
        if do == "load":
            return {"kind": "done", **self._load(header["folder"], header["digest"])}, {}
        if do == "generate":
            self._check(header["digest"])
            done, made = self.model.generate(header["sampling"], arrays)
            return {"kind": "done", "digest": self.digest, **done}, made
        if do == "status":
            return {"kind": "done", "digest": self.digest, "pid": os.getpid()}, {}
        if do in ("sleep", "wake"):
            self.model.sleep() if do == "sleep" else self.model.wake()
            return {"kind": "done"}, {}
        raise ValueError(f"no such request: {do!r}")

    def _load(self, folder: str, digest: str) -> dict[str, Any]:
        found = wire.digest_of(pathlib.Path(folder))
        if found != digest:
            raise StaleError(
                f"{folder} holds weights of digest {found}, and {digest} was announced: the folder "
                "is stale, or was not written to its end."
            )
        self.digest = None  # of nothing whole, until all is in
        report = self.model.load(folder)
        if report["wrong"]:
            raise StaleError(
                f"after loading, the model does not hold what {folder} does in {report['wrong']}."
            )
        self.digest = digest
        return {"digest": digest, **report}

    def _check(self, digest: str) -> None:
        if self.digest != digest:
            raise StaleError(
                f"the server holds weights of digest {self.digest}, and samples of {digest} are "
                "asked for. Has another run loaded its own in between?"
            )

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                job = _Job(*wire.receive(connection))
                self._work.put(job)
                while not job.done.wait(BEAT_SECONDS):
                    wire.send(connection, {"kind": "busy", "with": self._doing})
                header, arrays = job.reply
                wire.send(connection, header, **arrays)
            except (OSError, wire.WireError):
                return  # the client has gone


class _Job:
    """A request that waits for its answer."""

    def __init__(self, header: dict[str, Any], arrays: Arrays):
        self.header, self.arrays = header, arrays
        self.reply: tuple[dict[str, Any], Arrays] = ({}, {})
        self.done = threading.Event()

    def answer(self, header: dict[str, Any], arrays: Arrays) -> None:
        self.reply = header, arrays
        self.done.set()
