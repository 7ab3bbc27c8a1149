"""Losses as pure functions of arrays with explicit masks."""

from occ.extras import require

require("train", __name__, "jaxtyping")
