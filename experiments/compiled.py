"""Programs that were compiled before are read from disk."""

from __future__ import annotations

import jax

from occ.buckets import Path, absolute


def keep_compiled(folder: Path) -> None:
    """Keeps what takes longer than a second to compile in a folder, for later processes.

    A folder that the user chose (JAX_COMPILATION_CACHE_DIR) stays the one that is used.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(absolute(folder)))
