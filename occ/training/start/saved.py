"""A saved starting point: parameters after the warm start, with what decided them."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from occ.training.processes import is_first, wait_for_all


def _folder(folder: pathlib.Path, decides: dict[str, Any]) -> pathlib.Path:
    text = json.dumps(decides, sort_keys=True)
    return folder.absolute() / hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def save_start(folder: pathlib.Path, decides: dict[str, Any], start: tuple[Any, Any]) -> None:
    """Saves (params, rest) under a key made of all settings that decided them.

    Args:
      folder: where starting points are kept.
      decides: JSON-like settings.
      start: (params, rest).
    """
    target = _folder(folder, decides)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target / "variables", {"params": start[0], "rest": start[1]}, force=True)
    if is_first():
        (target / "decides.json").write_text(json.dumps(decides, indent=2) + "\n")
    wait_for_all(f"{target} is saved")


def load_start(
    folder: pathlib.Path, decides: dict[str, Any], like: tuple[Any, Any]
) -> tuple[Any, Any] | None:
    """The starting point that these settings made before, or None.

    Args:
      folder: where starting points are kept.
      decides: JSON-like settings.
      like: (params, rest) of the shapes wanted.
    """
    target = _folder(folder, decides)
    if not (target / "decides.json").exists():
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": like[0], "rest": like[1]})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(target / "variables", abstract)
    return restored["params"], restored["rest"]
