"""Accuracies and their intervals."""

from occ.extras import require

require("train", __name__, "flax", "jaxtyping", "scipy")
