"""Published sets of mathematics problems, as TFDS builders."""

from occ.extras import require

require("data", __name__, "pyarrow", "requests", "tensorflow_datasets")

from occ.tasks.datasets.builder import Counts, counts, prepare, read  # noqa: E402
from occ.tasks.datasets.published import SIX, TABLE, Published, find  # noqa: E402

__all__ = ["SIX", "TABLE", "Counts", "Published", "counts", "find", "prepare", "read"]
