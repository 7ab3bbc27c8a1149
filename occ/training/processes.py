"""Several processes as one run: joining, dividing work between them, agreeing.

Every process runs the same program in step. Arrays on the mesh are spread over all of them; what
the host needs of them is gathered, and what the host computes is computed alike by all, except for
verifying, which is divided. Without several processes everything here is the identity.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from occ.training.meeting import meet

HEARTBEAT_SECONDS = 20
"""After so long without a sign of life from one process, the others end."""


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Makes this process part of a run; before anything else touches a device.

    Args:
      coordinator: "host:port" of process 0; None asks the cluster (TPU pods, SLURM, Open MPI).
      count: processes; None likewise.
      index: of this one, from 0; None likewise.

    Raises:
      ValueError: some of the three are given, and not all; or as `meeting.meet` says.
      TimeoutError: not all of them came.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if any(given) and not all(given):
        raise ValueError(
            "join: expected coordinator, number of processes and index of this one together, or "
            f"none of them where the cluster knows, got {coordinator!r}, {count} and {index}."
        )
    if coordinator is not None and count is not None and index is not None:
        meet(coordinator, count, index)
    jax.distributed.initialize(
        coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def is_first() -> bool:
    """Whether this process writes the run's files and speaks for it."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """Whole values of arrays on the mesh, as numpy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def gather(array):
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return np.asarray(array)
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(gather, tree)


def to_mesh(tree: Any, shardings: Any) -> Any:
    """Arrays on the mesh, from values that every process has whole."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(value, sharding):
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, shardings)


def my_share(rows: int) -> slice:
    """The rows of a batch that fall to this process, of nearly equal shares.

    >>> my_share(8)
    slice(0, 8, None)
    """
    count, index = jax.process_count(), jax.process_index()
    return slice(rows * index // count, rows * (index + 1) // count)


def collect_shares(share: np.ndarray, rows: int) -> np.ndarray:
    """All rows [rows, ...], from each process's `my_share` of them."""
    if jax.process_count() == 1:
        return share
    whole = np.zeros((rows, *share.shape[1:]), share.dtype)
    whole[my_share(rows)] = share
    # Others' rows are zero here, so that a sum over processes puts them together.
    return np.sum(multihost_utils.process_allgather(whole), axis=0).astype(share.dtype)


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the same place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of_all(flag: bool) -> bool:
    """Whether the flag is set on any process; the same answer on all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def from_first(value: np.ndarray) -> np.ndarray:
    """The first process's value, on all; its shape is the same on all."""
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def on_first(action: Callable[[], None]) -> None:
    """Runs it on the first process; all go on when it has ended.

    Raises:
      OSError, ValueError, RuntimeError: as the action does; on the other processes a RuntimeError
        with its words, so that none waits for ever for one that has ended.
    """
    error: Exception | None = None
    if is_first():
        try:
            action()
        except (OSError, ValueError, RuntimeError) as raised:
            error = raised
    words = texts_of_all("" if error is None else f"{type(error).__name__}: {error}")[0]
    if error is not None:
        raise error
    if words:
        raise RuntimeError(f"the first process ended: {words}")


def texts_of_all(text: str) -> list[str]:
    """The text of each process, on all."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([content.size], np.int32)).ravel()
    padded = np.zeros(int(sizes.max()) + 1, np.uint8)
    padded[: content.size] = content
    gathered = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(gathered, sizes, strict=True)]


def check_alike(what: str, fields: dict[str, Any]) -> None:
    """Ends all processes where one was started with something else than the first.

    Args:
      what: the fields describe.
      fields: JSON-like values by name.

    Raises:
      ValueError: on all of them; names the processes and the fields, with their values.
    """
    first, *others = (json.loads(text) for text in texts_of_all(json.dumps(fields)))
    differences = [
        f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process {index}"
        for index, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if differences:
        raise ValueError(
            f"the processes of a run must have the same {what}: {'; '.join(differences[:20])}. "
            "Start all of them with the same command."
        )


def key_on_mesh(seed: int, fold: int) -> jax.Array:
    """`fold_in(key(seed), fold)`, on every device of the mesh that is set."""
    if jax.process_count() == 1:
        return jax.random.fold_in(jax.random.key(seed), fold)

    def make(fold):
        return jax.random.fold_in(jax.random.key(seed), fold)

    # A typed key can be made on several processes' devices, and not moved there.
    return jax.jit(make, out_shardings=jax.P())(np.int32(fold))
