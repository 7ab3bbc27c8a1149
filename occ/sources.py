"""Where files that others made are found: a path, or inside an installed package."""

from __future__ import annotations

import importlib.util
import pathlib

PACKAGE = "package:"


def resolve(source: str) -> pathlib.Path:
    """The file or folder that a source names.

    Args:
      source: a path; or "package:NAME/FILE" for a file of an installed package, which is not
        imported; or "package:NAME" where the package holds one .gguf file.

    Raises:
      ValueError: no such package, file or folder, or not exactly one .gguf file.
    """
    if not source.startswith(PACKAGE):
        path = pathlib.Path(source).expanduser()
        if not path.exists():
            raise ValueError(f"resolve: there is no file or folder {str(path)!r}.")
        return path
    name, _, file = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"resolve: package {name!r} of {source!r} is not installed. Install it, or give the "
            "path of a folder or of a .gguf file."
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    found = [folder / file] if file else sorted(folder.glob("*.gguf"))
    if len(found) != 1 or not found[0].exists():
        raise ValueError(
            f"resolve: expected {file or 'one .gguf file'!r} in package {name!r}, which holds "
            f"{sorted(path.name for path in folder.iterdir())}. Use 'package:NAME/FILE'."
        )
    return found[0]
