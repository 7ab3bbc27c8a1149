"""Where files of others are found: a path, a bucket, a package, or huggingface_hub's cache."""

from __future__ import annotations

import importlib.util
import pathlib
import re

from occ import buckets

PACKAGE = "package:"


def resolve(source: str) -> pathlib.Path:
    """The file or folder that a source names.

    Args:
      source: a path; or "gs://BUCKET/FOLDER", of which what is returned is a local copy
        (`occ.buckets.staging`); or "OWNER/NAME", a model that huggingface_hub has fetched before
        (nothing is fetched here); or "package:NAME/FILE" for a file of an installed package, which
        is not imported; or "package:NAME" where the package holds one .gguf file.

    Raises:
      ImportError: the extra buckets is not installed.
      ValueError: no such package, file, folder or model, or not exactly one .gguf file.
    """
    if source.startswith("gs://"):
        found = buckets.path(source)
        from occ.buckets.staging import stage

        return stage(found)
    if not source.startswith(PACKAGE):
        path = pathlib.Path(source).expanduser()
        if path.exists():
            return path
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            return _fetched(source)
        raise ValueError(
            f"resolve: there is no file or folder {str(path)!r}. Expected the path of one, "
            "gs://BUCKET/FOLDER, OWNER/NAME in huggingface_hub's cache, or package:NAME."
        )
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


def cached_dataset_file(repository: str, path: str, revision: str) -> pathlib.Path | None:
    """A file of a dataset at a revision, where huggingface_hub has fetched it before; else None."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(
        repository, path, constants.HF_HUB_CACHE, revision, repo_type="dataset"
    )
    return pathlib.Path(found) if isinstance(found, str) else None  # or what says: not there


def _fetched(name: str) -> pathlib.Path:
    """The newest snapshot of a model in the cache of huggingface_hub."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"resolve: there is no file or folder {name!r}, and the package huggingface_hub, whose "
            "cache may have the model of that name, is not installed: "
            "pip install 'occ-jax[pretrained]'."
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return pathlib.Path(
            snapshot_download(name, cache_dir=constants.HF_HUB_CACHE, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        raise ValueError(
            f"resolve: there is no file or folder {name!r}, and no such model in the cache "
            f"{constants.HF_HUB_CACHE}. Fetch it first, where there is a network: "
            f"hf download {name}"
        ) from None
