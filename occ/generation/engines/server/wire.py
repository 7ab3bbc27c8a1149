"""Messages between a run and an engine in another process: a line of JSON, and arrays.

    8 bytes: length of the header, big-endian
    header:  UTF-8 JSON, an object; "arrays" lists [name, dtype, shape] of what follows
    arrays:  their bytes, little-endian, one after the other

Nothing in a message is ever run or unpickled. Both ends import this file, the engine's by its path,
so that it needs the standard library and numpy alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import socket
import struct
from typing import Any

import numpy as np

VERSION = 1
LARGEST_HEADER = 2**26
LARGEST_ARRAYS = 2**34
DTYPES = ("int16", "int32", "int64", "float32", "bool")


class WireError(Exception):
    """The other end sent something that is no message, or went away within one."""


def send(connection: socket.socket, header: dict[str, Any], **arrays: np.ndarray) -> None:
    """Sends one message.

    Args:
      connection: connected socket.
      header: what JSON has a form for; "arrays" is taken.
      **arrays: of a dtype in `DTYPES`.
    """
    described, content = [], []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(f"send: array {name!r} is of {array.dtype}, expected one of {DTYPES}.")
        described.append([name, array.dtype.name, list(array.shape)])
        content.append(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    text = json.dumps({**header, "arrays": described}).encode()
    connection.sendall(struct.pack(">Q", len(text)) + text + b"".join(content))


def receive(connection: socket.socket) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The next message: its header, and its arrays by name.

    Raises:
      WireError: it is no message, or the connection ended.
      TimeoutError: nothing came for as long as the socket's timeout.
    """
    (length,) = struct.unpack(">Q", _exactly(connection, 8))
    if length > LARGEST_HEADER:
        raise WireError(f"a header of {length} bytes, expected at most {LARGEST_HEADER}")
    try:
        header = json.loads(_exactly(connection, length))
        described = header.pop("arrays")
        sizes = [_size(dtype, shape) for _, dtype, shape in described]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(f"no header of a message: {error}") from error
    if sum(sizes) > LARGEST_ARRAYS:
        raise WireError(f"arrays of {sum(sizes)} bytes, expected at most {LARGEST_ARRAYS}")
    arrays = {}
    for (name, dtype, shape), size in zip(described, sizes, strict=True):
        values = np.frombuffer(_exactly(connection, size), np.dtype(dtype).newbyteorder("<"))
        arrays[name] = values.astype(dtype).reshape(shape)
    return header, arrays


def _size(dtype: str, shape: list[int]) -> int:
    if dtype not in DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"array of {dtype!r} {shape!r}")
    return math.prod(shape) * np.dtype(dtype).itemsize


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 2**20))
        if not part:
            raise WireError("the connection ended")
        parts += part
    return bytes(parts)


def digest_of(folder: pathlib.Path) -> str:
    """A digest of all weights in a folder: of the names and bytes of its .safetensors files.

    Raises:
      FileNotFoundError: it holds none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as content:
            of_file = hashlib.file_digest(content, "blake2b").hexdigest()[:32]
        digest.update(f"{file.name} {of_file}\n".encode())
    return digest.hexdigest()


def address_of(text: str) -> tuple[socket.AddressFamily, Any]:
    """Family and address of "unix:PATH" or "HOST:PORT".

    Raises:
      ValueError: it is neither.
    """
    if text.startswith("unix:"):
        return socket.AF_UNIX, text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {text!r}: expected unix:PATH or HOST:PORT.")
    return socket.AF_INET, (host, int(port))
