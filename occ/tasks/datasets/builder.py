"""One TFDS builder for all published sets: their released files to array_record, and back.

    data_dir/manual/NAME/PATH      files put there by hand, at their path in the repository; else
                                   those in huggingface_hub's cache are taken
    data_dir/downloads/            files that TFDS downloaded
    data_dir/published_problems/   what was prepared: array_record, with features and counts

A file that was put into the manual folder is used, and its download skipped; a single file of
another name in that of a set with one file is taken for it, in either format:

    huggingface-cli download --repo-type dataset --revision REVISION --local-dir \
        DATA_DIR/manual/NAME REPOSITORY

Checksums. Every file whose sum is known (`published.py`) must have it, downloaded or not; to use
another file on purpose, pass `verify=False`. TFDS keeps sums of its own in a file that
`register_checksums` writes; it wants the size too and checks downloads alone, so it is not used.
The sums of the files that were read are kept with what was prepared. That is used again as long as
they are the right ones: with `verify`, those that are known, and always those of files that lie in
the manual folder today.

TensorFlow is never imported: the files are array_record, read through `tfds.data_source`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds

from occ import buckets, sources
from occ.buckets import Path
from occ.tasks.datasets.files import FORMATS, Row, rows, sha256
from occ.tasks.datasets.published import TABLE, File, Published, find

SECONDS = 20  # to wait for an answer from where a file is published


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the rows of a split.

    Attributes:
      rows: in its files.
      duplicates: left out since their problem stood there before, with the same answer.
      conflicting: left out since the same problem stands there with another answer too; all of
        its rows are.
      kept: problems.
    """

    rows: int
    duplicates: int
    conflicting: int
    kept: int


class PublishedProblems(tfds.core.GeneratorBasedBuilder):
    """Problems with reference answers, each once; a configuration for each published set.

    Args:
      verify: refuse files whose sum is known and not theirs.
      **options: TFDS's.
    """

    name = "published_problems"
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS's
        tfds.core.BuilderConfig(name=name, version="1.1.0", description=published.title)
        for name, published in TABLE.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Files go where they are in the repository of the set."
    # Sums are checked here; and looking for TFDS's own imports importlib_resources, which it does
    # not install.
    url_infos = None

    def __init__(self, *, verify: bool = True, **options: Any):
        self._verify = verify
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        published = self._published
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{published.title}. Licence: {published.licence}.",
            features=tfds.features.FeaturesDict(
                {name: text() for name in Row._fields} | {"row": np.int64}
            ),
            homepage=published.homepage,
            citation=published.reference,
            license=published.licence,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(revision=published.revision, licence=published.licence),
        )

    @property
    def _published(self) -> Published:
        return find(self.builder_config.name)

    def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = {
            split: [(file, self._locate(file, manager)) for file in released]
            for split, released in self._published.files.items()
        }
        self.info.metadata["sha256"] = {
            file.path: self._sum(file, path) for found in files.values() for file, path in found
        }
        return {split: self._generate_examples(split, found) for split, found in files.items()}

    def _locate(self, file: File, manager: tfds.download.DownloadManager) -> pathlib.Path:
        by_hand = self.by_hand(file)
        if by_hand.exists():
            return by_hand
        published = self._published
        cached = sources.cached_dataset_file(published.repository, file.path, published.revision)
        if cached is not None:
            return cached
        url = published.url(file)
        try:
            # TFDS tries for minutes before it says that there is no network.
            requests.head(url, allow_redirects=True, timeout=SECONDS).raise_for_status()
            return pathlib.Path(manager.download(url))
        except OSError as error:  # of requests and of urllib too
            raise FileNotFoundError(
                f"{self._published.title}: {by_hand} does not exist, and {url} could not be "
                f"downloaded ({type(error).__name__}). Download it elsewhere, and put it there; or "
                "fill huggingface_hub's cache where there is a network: hf download "
                f"{published.repository} {file.path} --repo-type dataset "
                f"--revision {published.revision}"
            ) from error

    def by_hand(self, file: File) -> pathlib.Path:
        """Where a file was put, or would be."""
        place = self._manual_folder / file.path
        if place.exists() or sum(map(len, self._published.files.values())) > 1:
            return place
        others = sorted(p for p in self._manual_folder.rglob("*") if p.suffix in FORMATS)
        return others[0] if len(others) == 1 else place

    @property
    def _manual_folder(self) -> pathlib.Path:
        return pathlib.Path(self.data_dir_root) / "manual" / self._published.name

    def _sum(self, file: File, path: pathlib.Path) -> str:
        found = sha256(path)
        if self._verify and file.sha256 not in (None, found):
            raise ValueError(
                f"{path}: expected the SHA-256 {file.sha256} of the published file, got {found}. "
                "Download it again; to use another file on purpose, prepare with verify=False."
            )
        return found

    def check_prepared(self) -> None:
        """Raises if what was prepared is not of the right files.

        Raises:
          ValueError: with the file, and what to do.
        """
        sums = self.info.metadata["sha256"]
        for file in (file for files in self._published.files.values() for file in files):
            path, found = self.by_hand(file), sums.get(file.path)
            problem = ""
            if path.exists() and sha256(path) != found:
                problem = f"{path} was put in the place of the file that it was prepared from"
            elif self._verify and file.sha256 not in (None, found):
                problem = (
                    f"it was prepared with verify=False from a {file.path} with the SHA-256 "
                    f"{found}, not the published {file.sha256}"
                )
            if problem:
                raise ValueError(
                    f"{self._published.title}: what was prepared in {self.data_dir} is not used, "
                    f"since {problem}. Delete that folder to prepare the set again."
                )

    def _generate_examples(
        self, split: str, files: Sequence[tuple[File, pathlib.Path]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        found = (row for file, path in files for row in rows(path, self._published, file.path))
        kept, counts = deduplicate(found)
        self.info.metadata.setdefault("counts", {})[split] = dataclasses.asdict(counts)
        for number, row in kept:
            yield number, {**row._asdict(), "row": number}


def deduplicate(found: Iterable[Row]) -> tuple[list[tuple[int, Row]], Counts]:
    """Each problem once, at the place where it stood first.

    Problems are the same if their texts are: "1.5 + 2" and "15 + 2" are two. One that stands there
    with several answers is left out: which is right cannot be told from the file.

    Returns:
      (number of the row, row) of those that are kept, and counts.
    """
    first: dict[str, tuple[int, Row]] = {}
    conflicts: set[str] = set()
    sizes: dict[str, int] = {}
    for number, row in enumerate(found):
        key = row.problem
        sizes[key] = sizes.get(key, 0) + 1
        if first.setdefault(key, (number, row))[1].answer != row.answer:
            conflicts.add(key)
    kept = [value for key, value in first.items() if key not in conflicts]
    conflicting = sum(sizes[key] for key in conflicts)
    total = sum(sizes.values())
    return kept, Counts(total, total - conflicting - len(kept), conflicting, len(kept))


def prepare(name: str, data_dir: str | pathlib.Path, *, verify: bool = True) -> PublishedProblems:
    """The builder of a set, prepared; what was prepared before is not read again.

    Args:
      name: of the set, a key of `published.TABLE`, or its repository "OWNER/NAME" on the hub.
      data_dir: for all of its files. From a bucket those in manual/NAME are copied to this host's
        disk, and prepared there, since array_record files are read in place.
      verify: refuse files whose sum is known and not theirs.

    Raises:
      ValueError: unknown set; a file has the wrong sum, or is not of its format; a row lacks a
        field or has a wrong value there; what is prepared is of other files.
      FileNotFoundError: a file is not there and cannot be downloaded.
    """
    name = find(name).name
    if str(data_dir).startswith("gs://"):
        data_dir = _staged(buckets.path(data_dir), name)
    builder = PublishedProblems(
        config=name,
        data_dir=str(data_dir),
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
        verify=verify,
    )
    if builder.is_prepared():
        builder.check_prepared()
    with contextlib.redirect_stdout(sys.stderr):  # where its progress goes too
        builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
    return builder


def _staged(data_dir: Path, name: str) -> pathlib.Path:
    """A data_dir on this host's disk, with the files that lie in a bucket's."""
    from occ.buckets.staging import stage, staging_folder

    by_hand = data_dir / "manual" / name
    if by_hand.is_dir():
        stage(by_hand)
    return staging_folder() / str(data_dir).removeprefix("gs://")


def counts(builder: PublishedProblems) -> dict[str, Counts]:
    """What became of the rows of each split, as kept with what was prepared."""
    return {split: Counts(**found) for split, found in builder.info.metadata["counts"].items()}


def read(example: dict[str, Any]) -> Row:
    """A record of `builder.as_data_source`, whose texts are bytes."""
    return Row(*(example[name].decode() for name in Row._fields))
