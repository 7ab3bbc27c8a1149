"""Sampling with a key-value cache."""

from occ.extras import require

require("train", __name__, "flax", "jaxtyping")
