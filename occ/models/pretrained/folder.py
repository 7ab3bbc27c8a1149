"""A folder of safetensors files, read tensor by tensor, or a part of one."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from occ import json_files
from occ.extras import require

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DIGESTS = "occ_digests.json"
"""Of the weight files of a folder that `save` wrote."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class TensorInfo(NamedTuple):
    """Where a tensor is, its shape, and its dtype in the words of the format ("BF16")."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class WeightFolder:
    """The tensors of a published checkpoint.

    Nothing is read but headers until `read`. Files are mapped into memory, so that a part of a
    tensor costs that part.

    Args:
      path: a folder with config.json and model.safetensors, or several files and their index.

    Attributes:
      tensors: by name.

    Raises:
      ValueError: it is no such folder, holds pickled weights only, or its index names files or
        tensors that are not there, or places a tensor elsewhere than where one is.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._open: dict[str, Any] = {}
        index = _files(self.path)
        misplaced = []
        for file in sorted(set(index.values())) if index else [SINGLE]:
            handle = self._file(file)
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                if index.get(name, file) != file:
                    misplaced.append(f"{name}: in {file}, by the index in {index[name]}")
                piece = handle.get_slice(name)
                self.tensors[name] = TensorInfo(file, tuple(piece.get_shape()), piece.get_dtype())
        if misplaced:
            raise ValueError(
                f"{self.path / INDEX} places tensors elsewhere than where there are some of their "
                f"name:{listed(misplaced)}\nOne of each pair is left from another model. Download "
                "the folder again."
            )
        absent = sorted(index.keys() - self.tensors.keys())
        if absent:
            raise ValueError(
                f"{self.path / INDEX} lists tensors that its files do not hold:{listed(absent)}\n"
                "Download the folder again."
            )

    def read(self, name: str, window: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it in a window."""
        info = self.tensors[name]
        self.dtype(name)
        handle = self._file(info.file)
        if not info.shape or not window:
            return handle.get_tensor(name)
        return handle.get_slice(name)[window]

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor.

        Raises:
          ValueError: it does not hold numbers that parameters are made of.
        """
        kind = self.tensors[name].dtype
        if kind not in DTYPES:
            raise ValueError(
                f"{self.path / self.tensors[name].file}: tensor {name!r} is of type {kind}, "
                f"expected one of {sorted(DTYPES)}. Quantised weights are not supported: take the "
                "folder that they were made from."
            )
        return DTYPES[kind]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            require("pretrained", "occ.models.pretrained", "safetensors")
            import safetensors

            try:
                self._open[name] = safetensors.safe_open(self.path / name, framework="np")
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"{self.path / name} is no whole safetensors file ({error}). Download it again."
                ) from error
        return self._open[name]


def _files(path: pathlib.Path) -> dict[str, str]:
    """The file of each tensor as the index has it; {} for a single file."""
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder (of a .gguf file: occ.models.gguf.load). Pass a folder with "
            "config.json and .safetensors files, downloaded beforehand."
        )
    if (path / INDEX).exists():
        index = json_files.read_object(path / INDEX, "weight_map")["weight_map"]
        if not isinstance(index, dict) or not all(isinstance(x, str) for x in index.values()):
            raise ValueError(f"{path / INDEX}: weight_map must give each tensor's file.")
        outside = sorted({file for file in index.values() if pathlib.PurePath(file).name != file})
        absent = sorted({file for file in index.values() if not (path / file).is_file()})
        if outside or absent:
            raise ValueError(
                f"{path / INDEX} names files that are not in the folder:"
                f"{listed(outside + absent)}\nDownload the folder again."
            )
        return index
    if (path / SINGLE).is_file():
        return {}
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{path} holds pickled weights only ({', '.join(pickled[:3])}), which may run any "
            "code when they are read, and are refused. Take the model's .safetensors files, or "
            "convert them where you trust them (with transformers: from_pretrained, then "
            "save_pretrained(..., safe_serialization=True))."
        )
    there = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} holds neither {SINGLE} nor {INDEX}, but {there}. Fetch the model whole (hf "
        "download OWNER/NAME), or give the path of a .gguf file itself."
    )


def write_digests(path: pathlib.Path) -> None:
    """Writes a digest of each weight file of a folder."""
    digests = {file.name: _digest(file) for file in sorted(path.glob("*.safetensors"))}
    (path / DIGESTS).write_text(json_files.dump(digests, indent=2) + "\n", encoding="utf-8")


def check_digests(path: pathlib.Path) -> None:
    """Compares the weight files of a folder with the digests that it was written with, if any.

    Raises:
      ValueError: a file is not what was written; it is named.
    """
    if not (path / DIGESTS).exists():
        return
    for name, digest in json_files.read_object(path / DIGESTS).items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            raise ValueError(
                f"{path / name} is not the file that was written with the folder. Write or copy "
                f"the folder again; if it was changed on purpose, delete its {DIGESTS}."
            )


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()[:32]


def listed(names: list[str], most: int = 20) -> str:
    """Names as lines of an error message, the first ones of many."""
    more = [f"... and {len(names) - most} more"] if len(names) > most else []
    return "".join(f"\n  {name}" for name in [*names[:most], *more])
