"""What to install where a subpackage needs more than the transformation does."""

from __future__ import annotations

import importlib.util


def require(extra: str, package: str, *modules: str) -> None:
    """Asks for an extra before the first import that would fail without it.

    Args:
      extra: of this distribution, as setup.py names it.
      package: that needs it.
      *modules: of the extra, top-level names; they are looked for, not imported.

    Raises:
      ImportError: some of them are not installed.

    >>> require("train", "occ.models", "jax", "no_such_module")
    Traceback (most recent call last):
    ImportError: occ.models needs no_such_module, not installed: pip install 'occ-jax[train]'.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{package} needs {', '.join(missing)}, not installed: pip install 'occ-jax[{extra}]'.",
            name=missing[0],
        )
