"""Published sets of mathematics problems, as TFDS builders."""

from occ.tasks.datasets.builder import Counts, counts, prepare, read
from occ.tasks.datasets.published import SIX, TABLE, Published, find

__all__ = ["SIX", "TABLE", "Counts", "Published", "counts", "find", "prepare", "read"]
