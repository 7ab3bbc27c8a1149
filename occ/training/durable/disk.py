"""Writing that survives a power cut, and full disks that say what would help.

In a bucket the same words mean what `occ.buckets` says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import types
from collections.abc import Iterator

from occ.buckets import Path, is_bucket


class DiskFullError(OSError):
    """A disk or quota is full; the message says what was needed and what can be deleted."""


FULL = (errno.ENOSPC, errno.EDQUOT)


def replace(file: Path, content: str | bytes) -> None:
    """Writes beside the file, then renames: whatever happens, it holds the old or the new."""
    content = content.encode() if isinstance(content, str) else content
    if is_bucket(file):
        return _store().replace(file, content)
    beside = file.with_name(file.name + ".new")
    with beside.open("wb") as out:
        out.write(content)
        out.flush()
        _to_disk(out.fileno())
    beside.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        _to_disk(folder)  # the rename itself
    finally:
        os.close(folder)


def append_text(file: Path, text: str) -> None:
    """Adds to the end of a file; returns when the disk has it.

    Raises:
      ChangedError: another process has written to it, of an object in a bucket.
    """
    if is_bucket(file):
        return _store().append(file, text.encode())
    with file.open("a") as out:
        out.write(text)
        out.flush()
        _to_disk(out.fileno())


def _store() -> types.ModuleType:
    from occ.buckets import store  # which the extra buckets installs

    return store


def _to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network filesystems have no fsync for folders
            raise


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or quota is full, from Python or from TensorStore."""
    if isinstance(error, OSError):
        return error.errno in FULL
    # TensorStore's is a ValueError with the system's words in it.
    return any(os.strerror(code) in str(error) for code in FULL)


@contextlib.contextmanager
def explained(run: Path, needed: int) -> Iterator[None]:
    """Turns the error of a full disk into one that says what to do.

    Args:
      run: folder of the run that is being written to.
      needed: bytes that the block writes.

    Raises:
      DiskFullError: in place of any error that means it.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_full(error):
            raise
        if is_bucket(run):  # an account's quota, which nothing that is deleted here would mend
            raise DiskFullError(errno.ENOSPC, f"no space left for {run}: {error}") from error
        there = next(part for part in (run, *run.parents) if part.exists())
        free = shutil.disk_usage(there).free
        raise DiskFullError(
            errno.ENOSPC,
            f"no space left for {run}: {needed:,} bytes and their index were to be written, "
            f"{free:,} are free. What was saved before is whole: make space, and give the same "
            f"command again.{_dispensable(run)}",
        ) from error


def _dispensable(run: pathlib.Path) -> str:
    """A sentence on what is not needed to go on, the largest first; "" where there is nothing."""
    checkpoints = [
        path
        for path in (run / "checkpoints").glob("*")
        if path.name.isdigit() or ".damaged" in path.name
    ]
    newest = max((int(path.name) for path in checkpoints if path.name.isdigit()), default=None)
    candidates = [path for path in checkpoints if path.name != str(newest)]
    candidates += [path for path in (run / "tensorboard", run / "samples.jsonl") if path.exists()]
    sizes = sorted(((_size(path), path) for path in candidates), reverse=True)
    listed = [f"{path.relative_to(run)} ({size:,} bytes)" for size, path in sizes]
    return f" In this folder the run can do without {', '.join(listed)}." if listed else ""


def _size(path: pathlib.Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
