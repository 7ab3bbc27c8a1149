"""Functions for worker processes that go wrong in every way that an argument may ask for.

Loaded by path in workers, so nothing of the package is imported here.
"""

import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import time


def spin():
    while True:
        pass


def big_integer():
    return 9 ** (9**9)  # one operation of the interpreter, in which no signal handler runs


def eat_memory():
    hoard = []
    while True:
        # In few steps, so that it meets the bound on memory long before the one on time.
        hoard.append(bytearray(2**28))


FAULTS = {
    "spin": spin,
    "sleep": lambda: time.sleep(3600),
    "big integer": big_integer,
    "eat memory": eat_memory,
    "exit 0": lambda: os._exit(0),
    "exit 3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "recurse": lambda: json.loads("[" * 10**5),
    "raise": lambda: {}["missing"],
    "not json": lambda: {1, 2},
    "exit of python": lambda: exit(0),
    "long reply": lambda: "x" * 2**21,
    "eval": lambda: eval("1+1"),
    "exec": lambda: exec("x = 1"),
    "write": lambda: pathlib.Path("CANARY").write_text("here"),
    "remove": lambda: os.remove("CANARY"),
    "mkdir": lambda: os.mkdir("CANARY"),
    "system": lambda: os.system("true"),
    "process": lambda: subprocess.run(["true"], check=False).returncode,
    "fork": lambda: os.fork() and None,
    "socket": lambda: socket.socket().fileno(),
    "close pipe": lambda: os.closerange(3, 256),
}


def check(request):
    """`request`, upper case, unless it names a fault or asks to see something."""
    if request == "environment":
        return sorted(os.environ)
    if request == "process id":
        return os.getpid()
    if request.startswith("write "):
        return pathlib.Path(request.removeprefix("write ")).write_text("here")
    if request in FAULTS:
        return FAULTS[request]()
    return request.upper()


def judge(pairs):
    """In place of `math_numeric.judge`: none is equal; a variable may name a fault."""
    found = json.loads(pairs)
    named = [fault for name, fault in FAULTS.items() if f'"x_{name.replace(" ", "")}"' in pairs]
    return named[0]() if named else [False] * len(found)
