"""The pre-norm transformer block, dense or with a mixture of experts."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from occ.models.attention import Attention, Context
from occ.models.cache import Past, StackCache
from occ.models.config import ModelConfig
from occ.models.layers import MLP, RMSNorm
from occ.models.moe import MixtureOfExperts


class BlockOutput(NamedTuple):
    """What a block hands on.

    Attributes:
      hidden: float [B, T, D].
      new: its keys and values.
      load: float32 [E], tokens that each expert received; None without experts.
      experts: int32 [B, T, k], those of each token; None likewise.
    """

    hidden: jax.Array
    new: StackCache
    load: jax.Array | None
    experts: jax.Array | None


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
        self,
        x: Float[Array, "batch time width"],
        context: Context,
        past: Past | None = None,
        replayed: Int[Array, "batch time k"] | None = None,
        *,
        generating: bool = False,
    ) -> BlockOutput:
        """Attention and MLP, each on the normalised sum of what came before it.

        Args:
          x: hidden state.
          context: of the tokens.
          past: what they see before them; None are whole sequences.
          replayed: experts of each token, as of `MixtureOfExperts`.
          generating: parameters are gathered along "fsdp", once for all tokens.
        """
        mixed, new = self.attention(self.attention_norm(x), context, past)
        x = x + mixed
        normal = self.mlp_norm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            update, load, experts = self.mlp(normal, context.valid, replayed, whole=generating)
        else:
            update, load, experts = self.mlp(normal), None, None
        return BlockOutput(x + update, new, load, experts)
