"""Compiling costs runs of minutes half their time: it is done once, and no better than needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import jax

from occ.buckets import Path, absolute

LEVEL = "--xla_backend_optimization_level"
ACCELERATORS = ("jax_plugins", "libtpu")


def compile_quickly() -> None:
    """Asks LLVM for little, in this process and those that it starts; call it before JAX computes.

    For small models on CPUs, whose time is in a library's matrix products: programs of the main job
    take two thirds of the time to compile, and run about as fast (LOG.md). A level that the user
    chose in XLA_FLAGS stays, and where JAX may find another device all stays as it is, since the
    flag would reach that one's kernels too.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if LEVEL not in flags and cpu_alone():
        os.environ["XLA_FLAGS"] = f"{flags} {LEVEL}=1".strip()


def cpu_alone() -> bool:
    """Whether JAX can have no device but the CPU, as far as that shows before it looks for one."""
    if (os.environ.get("JAX_PLATFORMS") or jax.config.values["jax_platforms"]) == "cpu":
        return True
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not (plugins or any(importlib.util.find_spec(name) for name in ACCELERATORS))


def keep_compiled(folder: Path) -> None:
    """Keeps what takes longer than a second to compile in a folder, for later processes.

    A folder that the user chose (JAX_COMPILATION_CACHE_DIR) stays the one that is used.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(absolute(folder)))
