"""The pre-norm transformer block, dense or with a mixture of experts."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from occ.models.attention import Attention, Context, LayerCache
from occ.models.config import ModelConfig
from occ.models.layers import MLP, RMSNorm
from occ.models.moe import MixtureOfExperts


class BlockOutput(NamedTuple):
    """What a block hands on: hidden state, its cache, and the router's load [E] or None."""

    hidden: jax.Array
    cache: LayerCache | None
    load: jax.Array | None


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, sparse: bool = False):
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config)
        self.mlp: MixtureOfExperts | MLP
        if sparse:
            self.mlp = MixtureOfExperts(config, rngs)
        else:
            self.mlp = MLP(config, rngs, hidden=config.mlp_width)

    def __call__(
        self, x: Float[Array, "batch time width"], context: Context, cache: LayerCache | None = None
    ) -> BlockOutput:
        """Attention and MLP, each on the normalised sum of what came before it."""
        mixed, cache = self.attention(self.attention_norm(x), context, cache)
        x = x + mixed
        normal = self.mlp_norm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            update, load = self.mlp(normal, context.valid, whole=cache is not None)
        else:
            update, load = self.mlp(normal), None
        return BlockOutput(x + update, cache, load)
