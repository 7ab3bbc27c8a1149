"""Multi-token prediction modules: sequential, and parallel heads.

Module k at source position i predicts token i + k + 1. A sequential module sees the hidden state
of the one before it (module 1: of the trunk) at i and the embedding of token i + k.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from occ.models.attention import Context, Past
from occ.models.block import Block, BlockOutput
from occ.models.config import ModelConfig
from occ.models.layers import Embedding, Linear, RMSNorm


class SequentialModule(nnx.Module):
    """One module of the DeepSeek-V3 / MiMo form.

        z_k = block(W [norm(z_{k-1}); norm(embedding of token i + k)])

    Reference: DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2; Xiaomi
    LLM-Core Team, MiMo, arXiv 2505.07608.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.hidden_norm = RMSNorm(config.width, config)
        self.embedding_norm = RMSNorm(config.width, config)
        self.projection = Linear(2 * config.width, config.width, config, rngs)
        self.block = Block(config, rngs, sparse=config.moe is not None)
        self.final_norm = RMSNorm(config.width, config) if config.mtp.own_final_norm else None
        self.embedding = Embedding(config, rngs) if config.mtp.own_embedding else None
        self.output_head = _own_output_head(config, rngs)
        self.config = config

    def __call__(
        self,
        hidden: Float[Array, "batch time width"],
        embedding_ahead: Float[Array, "batch time width"],
        context: Context,
        past: Past | None = None,
        *,
        generating: bool = False,
    ) -> BlockOutput:
        """Hidden state of the head, from the one before it and the tokens ahead."""
        if self.config.mtp.zero_first_embedding:
            first = (context.positions == 0)[:, :, None]
            embedding_ahead = jnp.where(first, 0, embedding_ahead)
        pair = [self.hidden_norm(hidden), self.embedding_norm(embedding_ahead)]
        if self.config.mtp.concatenation == "embedding_hidden":
            pair.reverse()
        joined = self.projection(jnp.concatenate(pair, axis=-1))
        return self.block(joined, context, past, generating=generating)


class ParallelHead(nnx.Module):
    """A block on the trunk's hidden state alone, blind to the tokens in between.

    Reference: Gloeckle et al., Better & Faster Large Language Models via Multi-token Prediction,
    arXiv 2404.19737.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.block = Block(config, rngs, sparse=config.moe is not None)
        self.final_norm = RMSNorm(config.width, config) if config.mtp.own_final_norm else None
        self.output_head = _own_output_head(config, rngs)

    def __call__(
        self,
        hidden: Float[Array, "batch time width"],
        context: Context,
        past: Past | None = None,
        *,
        generating: bool = False,
    ) -> BlockOutput:
        """Hidden state of the head, from the trunk's."""
        return self.block(hidden, context, past, generating=generating)


def _own_output_head(config: ModelConfig, rngs: nnx.Rngs) -> Linear | None:
    if not config.mtp.own_output_head:
        return None
    return Linear(config.width, config.vocab_size, config, rngs)


def tokens_ahead(
    tokens: Int[Array, "batch time"], segment_ids: Int[Array, "batch time"], depth: int
) -> Int[Array, "batch time"]:
    """Token i + depth at position i; token 0 where that is beyond the sequence.

    No prediction that counts depends on the token 0: it stands only where the target is beyond
    the sequence too, and attention is causal.

    >>> import jax.numpy as jnp
    >>> tokens_ahead(jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 1, 1, 2]]), 1).tolist()
    [[6, 7, 0, 0]]
    """
    ahead = jnp.roll(tokens, -depth, axis=1)
    inside = jnp.roll(segment_ids, -depth, axis=1) == segment_ids
    not_beyond_end = jnp.arange(tokens.shape[1]) < tokens.shape[1] - depth
    return jnp.where(inside & not_beyond_end[None], ahead, 0)
