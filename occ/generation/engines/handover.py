"""Weights on their way to an engine: a published folder for each update, and its digest."""

from __future__ import annotations

import pathlib
import shutil
from typing import NamedTuple

import jax

from occ.generation.engines.server import wire
from occ.models import pretrained
from occ.models.policy import Policy


class Handed(NamedTuple):
    """One update.

    Attributes:
      folder: published form of the policy, MTP modules included.
      digest: of its weight files, by `wire.digest_of`.
    """

    folder: pathlib.Path
    digest: str


class Handover:
    """Writes each update beside the last one, which is deleted when nobody reads it any more.

    Args:
      folder: where; it must exist. In /dev/shm it is memory.
      like: folder that the run's model was loaded from, whose dtypes are kept; None writes
        `param_dtype`.
    """

    def __init__(self, folder: pathlib.Path, like: pathlib.Path | None = None):
        self._folder, self._like = folder, like
        self._number = 0
        self._before: list[pathlib.Path] = []

    def write(self, policy: Policy) -> Handed:
        """Writes a policy.

        Raises:
          ValueError: its architecture has no published form.
          OSError: there is no room; the message says for what.
        """
        self._number += 1
        target = self._folder / f"weights-{self._number:06d}"
        try:
            pretrained.save(target, policy, like=self._like)
        except OSError as error:
            raise OSError(
                error.errno,
                f"weights for the rollout engine could not be written ({error.strerror}): "
                f"{shutil.disk_usage(self._folder).free / 2**30:.1f} GiB are free. Give "
                "engine.folder a place for two copies of the model",
                str(self._folder),
            ) from error
        self._before.append(target)
        return Handed(target, wire.digest_of(target))

    def drop_older(self) -> None:
        """Deletes all but the newest."""
        for folder in self._before[:-1]:
            shutil.rmtree(folder, ignore_errors=True)
        del self._before[:-1]


class SameArrays:
    """Whether a policy has the very arrays of the last one: those cannot have changed."""

    def __init__(self) -> None:
        self._leaves: list[jax.Array] = []

    def __call__(self, policy: Policy) -> bool:
        """True if so."""
        now = jax.tree.leaves((policy.params, policy.rest))
        before = self._leaves
        return bool(now) and len(now) == len(before) and all(map(_is, now, before))

    def remember(self, policy: Policy | None) -> None:
        """Those of this policy; None is none."""
        self._leaves = [] if policy is None else jax.tree.leaves((policy.params, policy.rest))


def _is(left: object, right: object) -> bool:
    return left is right
