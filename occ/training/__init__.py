"""State, train step, rollout, loop."""

from occ.extras import require

require("train", __name__, "chex", "flax", "jaxtyping", "orbax")
