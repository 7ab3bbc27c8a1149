"""Google Cloud Storage by way of gcsfs: whole objects, each on condition of what was there.

Every object has a generation, a number that each write changes; 0 stands for no object. A write
or a deletion on condition of a generation is how several processes keep out of each other's way
(https://cloud.google.com/storage/docs/request-preconditions).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import re
import shutil
import uuid
from typing import Any, NamedTuple

import fsspec
from etils import epath
from fsspec import asyn
from gcsfs import core
from gcsfs.retry import is_retriable

from occ.buckets.outage import patiently
from occ.buckets.paths import Path

EMULATOR = "STORAGE_EMULATOR_HOST"
"""Where it is set there is an emulator at that address, which asks for no credentials."""

CHUNK = 2**24  # bytes of a file that are copied at one time
ONE_PIECE = 2**20  # bytes of a body that aiohttp sends without leave for others in between
TRIES = 3  # of an upload of a large file


class Object(NamedTuple):
    """An object as it was at one time.

    Attributes:
      content: all of it.
      generation: its number.
    """

    content: bytes
    generation: int


class ChangedError(RuntimeError):
    """An object is not the one that this process wrote: another process has written to it."""


class _Written(core.GCSFile):
    """A file that is written in one request where it is no larger than a block (5 MiB).

    gcsfs begins a session for each, in two requests, which a server may forget between them.
    """

    def _initiate_upload(self) -> None:
        if not (self.forced and self.autocommit):  # else all of it is in the buffer
            super()._initiate_upload()

    def _upload_chunk(self, final: bool = False) -> bool:
        if self.location is not None:
            return super()._upload_chunk(final)
        self._simple_upload()
        return True


class PatientStore(core.GCSFileSystem):
    """gcsfs that remembers no listings, and waits for a bucket that does not answer.

    The plain one: what it does for zonal buckets asks another service at the first request. Others
    write to the same folders (TensorStore, other processes), so what was listed before may be
    wrong; and what could not be asked is never taken for what is not there.
    """

    def __init__(self, *args: Any, **options: Any):
        if os.environ.get(EMULATOR):
            options.setdefault("token", "anon")
        super().__init__(*args, **{**options, "use_listings_cache": False})

    async def _request(self, method: str, path: str, *args: Any, **options: Any) -> Any:
        data = options.get("data")
        if isinstance(data, bytes | bytearray | memoryview) and len(data) > ONE_PIECE:
            options["data"] = core.UnclosableBytesIO(data)
        once = inspect.unwrap(core.GCSFileSystem._request)  # without gcsfs's own six tries
        request = functools.partial(once, self, method, path, *args, **options)
        found = re.search(r"\bb/([^/]+)", path.format(*args) if args else path)
        bucket = f"gs://{found[1]}" if found else "the buckets"
        return await patiently(request, f"{bucket} at {self._location}", _transient)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "r" in mode:
            return super()._open(path, mode, **options)
        options = {"block_size": self.default_block_size, "consistency": self.consistency} | options
        return _Written(self, path, mode, **options)

    async def _isdir(self, path: str) -> bool:
        try:
            return (await self._info(path))["type"] == "directory"
        except FileNotFoundError:
            return False

    async def _read_object(self, path: str) -> Object | None:
        bucket, key, _ = self.split_path(path)
        try:
            headers, content = await self._call("GET", "b/{}/o/{}", bucket, key, alt="media")
        except FileNotFoundError:
            return None
        return Object(content, int(headers["X-Goog-Generation"]))

    async def _write_object(self, path: str, content: bytes, generation: int) -> int | None:
        bucket, key, _ = self.split_path(path)
        border = uuid.uuid4().hex
        head = (
            f"--{border}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
            f"{json.dumps({'name': key})}\r\n"
            f"--{border}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        try:
            reply = await self._call(
                "POST",
                f"{self._location}/upload/storage/v1/b/{core.quote(bucket)}/o",
                uploadType="multipart",
                ifGenerationMatch=str(generation),
                headers={"Content-Type": f'multipart/related; boundary="{border}"'},
                data=head.encode() + content + f"\r\n--{border}--".encode(),
                json_out=True,
            )
        except FileExistsError:  # gcsfs's word for a condition that does not hold
            return None
        return int(reply["generation"])

    async def _delete_object(self, path: str, generation: int) -> bool:
        bucket, key, _ = self.split_path(path)
        match = str(generation)
        try:
            await self._call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=match)
        except (FileNotFoundError, FileExistsError):
            return False
        return True


def _transient(error: BaseException) -> bool:
    return isinstance(error, asyncio.TimeoutError | ConnectionError) or is_retriable(error)


@functools.cache
def use() -> None:
    """Makes it what `epath`, and so Orbax and JAX, take for gs://; before their first path."""
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, PatientStore, clobber=True)


@functools.cache
def _store() -> Any:
    use()
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that epath has


def read(file: Path) -> Object | None:
    """An object; None where there is none."""
    store = _store()
    return asyn.sync(store.loop, store._read_object, str(file))


def write(file: Path, content: bytes, generation: int) -> int | None:
    """Writes an object on condition that its generation is the one that is given.

    A reply that was lost on its way is asked for again: a write of this very content counts.

    Args:
      file: the object; one request writes it, so this is for megabytes.
      content: all of it, which no two writers write alike, or which it does no harm to write twice.
      generation: 0, there is none.

    Returns:
      Its generation now; None where another was there, which stays.
    """
    store = _store()
    written = asyn.sync(store.loop, store._write_object, str(file), content, generation)
    if written is None:
        found = read(file)
        if found is not None and found.content == content:
            return found.generation
    return written


def delete(file: Path, generation: int) -> bool:
    """Deletes an object on condition of its generation; whether it did."""
    store = _store()
    return asyn.sync(store.loop, store._delete_object, str(file), generation)


def replace(file: Path, content: bytes) -> None:
    """Writes an object, whatever was there: it holds the old or the new."""
    _written.pop(str(file), None)
    _store().pipe_file(str(file), content)


_written: dict[str, Object] = {}
"""What this process appended to, as it left it."""


def append(file: Path, content: bytes) -> None:
    """Adds to the end of an object: writes all of it again, and what it holds is old or new.

    The first time in a process it is read; later it must be what this process wrote then.

    Raises:
      ChangedError: it is not.
    """
    name = str(file)
    before = _written.get(name)
    if before is None:
        found = read(file)
        before = Object(b"", 0) if found is None else found
    whole = before.content + content
    generation = write(file, whole, before.generation)
    if generation is None:
        raise ChangedError(
            f"{file}: another process has written to it since this one did. Only one may work in a "
            "folder; end the other, and give the same command again."
        )
    _written[name] = Object(whole, generation)


def upload(source: str | os.PathLike[str], target: Path) -> None:
    """Copies a local file of any size to an object, which appears whole."""
    for tries_left in reversed(range(TRIES)):
        try:
            _store().put_file(os.fspath(source), str(target))
            return
        except FileNotFoundError:  # the session of a large upload, which the server has forgotten
            if not (tries_left and os.path.exists(source)):
                raise


def download(source: Path, target: str | os.PathLike[str]) -> None:
    """Copies an object of any size to a local file."""
    with source.open("rb") as content, open(target, "wb") as out:
        shutil.copyfileobj(content, out, CHUNK)


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """What gcsfs knows of an object, or of all objects of a folder, by name ("BUCKET/KEY")."""
    found = _store().find(str(folder), detail=True)
    return {name: info for name, info in sorted(found.items()) if info["type"] == "file"}


def named(name: str) -> Path:
    """The path of an object, by its name in a listing."""
    return epath.Path(f"gs://{name}")


def check_bucket(folder: Path) -> None:
    """Whether there is such a bucket, and it can be read.

    Raises:
      ValueError: there is none, or it may not be read.
    """
    store = _store()
    bucket = store.split_path(str(folder))[0]
    try:
        store.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: there is no bucket {bucket!r}. Make it first.") from error
    except OSError as error:  # gcsfs's for what is forbidden
        raise ValueError(f"{folder}: bucket {bucket!r} cannot be listed ({error}).") from error
