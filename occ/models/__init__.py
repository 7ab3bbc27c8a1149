"""Decoders with multi-token prediction modules."""

from occ.extras import require

require("train", __name__, "flax", "jaxtyping")
