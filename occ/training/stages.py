"""The model cut into stages, so that gradients can be weighed where they meet.

    trunk:    blocks, readout           -> hidden state                    [B, T, D]
    modules:  modules, readout, hidden  -> hidden states of the K modules  [K, B, T, D]
    head k:   modules, readout, hidden  -> log-probs of the batch's tokens [B, T]

`blocks` are the trunk's layers, `modules` the MTP modules' own parameters, and `readout` what
every loss reaches directly: embedding, final norm and output head. Gradients flow back through
each stage linearly, so cotangents can be added, or weighted, at every seam.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from occ.models import decoder
from occ.objectives import divergences, mtp

BLOCKS = ("dense_layers", "layers")
MODULES = ("mtp",)


class Parts(NamedTuple):
    """The parameters by stage; each a dict of some of the model's top-level names."""

    blocks: dict[str, Any]
    readout: dict[str, Any]
    modules: dict[str, Any]


def partition(params: dict[str, Any]) -> Parts:
    """Sorts the model's top-level parameter names into stages."""
    return Parts(
        blocks={name: tree for name, tree in params.items() if name in BLOCKS},
        readout={name: tree for name, tree in params.items() if name not in BLOCKS + MODULES},
        modules={name: tree for name, tree in params.items() if name in MODULES},
    )


def join(parts: Parts) -> dict[str, Any]:
    """The inverse of `partition`."""
    return {**parts.blocks, **parts.readout, **parts.modules}


def is_shared(path: str) -> bool:
    """Whether both losses reach the parameter at "path/of/leaf": all but the modules' own."""
    return path.split("/")[0] not in MODULES


class TokenScores(NamedTuple):
    """What a head says of the batch's tokens, in token alignment.

    Attributes:
      log_prob: float [B, T], of each token; 0 where `predictable` is False.
      entropy: float [B, T], of the distribution that the token was drawn from; likewise.
      greedy: int32 [B, T], the most likely token there.
    """

    log_prob: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]
    greedy: Any


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of one model on one batch.

    Attributes:
      graphdef, rest: the model without its parameters, from `split_model`.
      tokens, positions, segment_ids: int32 [B, T], the batch's layout.
      temperature: logits are divided by it, as they were when sampling.
    """

    graphdef: nnx.GraphDef
    rest: Any
    tokens: Any
    positions: Any
    segment_ids: Any
    temperature: float = 1.0

    def rows(self, rows: slice) -> Stages:
        """The same model on some of the batch's rows."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            segment_ids=self.segment_ids[rows],
        )

    def _model(self, parts: Parts) -> decoder.Decoder:
        return decoder.merge_model(self.graphdef, join(parts), self.rest)

    def trunk(self, parts: Parts) -> decoder.TrunkOutput:
        """Hidden state before the final norm, and the router's load."""
        return self._model(parts).trunk(self.tokens, self.positions, self.segment_ids)

    def modules(
        self, parts: Parts, hidden: Float[Array, "batch time width"]
    ) -> Float[Array, "heads batch time width"]:
        """Hidden states of the K modules."""
        model = self._model(parts)
        return model.mtp_hidden(hidden, self.tokens, self.positions, self.segment_ids)

    def head(
        self, parts: Parts, hidden: Float[Array, "batch time width"], depth: int
    ) -> TokenScores:
        """Scores of the tokens by the main head (depth 0) or MTP head `depth` >= 1."""
        model = self._model(parts)
        logits = model.logits(hidden) if depth == 0 else model.mtp_logits(hidden, depth - 1)
        logits = logits / self.temperature
        predictable = self.predictable(depth)
        log_prob = mtp.token_log_prob(logits, self.tokens, depth)
        entropy = mtp.align(divergences.token_entropy(logits), depth)
        greedy = mtp.align(jnp.argmax(logits, axis=-1).astype(jnp.int32), depth)
        return TokenScores(
            log_prob=jnp.where(predictable, log_prob, 0),
            entropy=jnp.where(predictable, entropy, 0),
            greedy=greedy,
        )

    def main_logits(
        self, parts: Parts, hidden: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time vocab"]:
        """Logits of the main head at their source positions."""
        return self._model(parts).logits(hidden) / self.temperature

    def divergence(
        self,
        parts: Parts,
        main_logits: Float[Array, "batch time vocab"],
        hidden: Float[Array, "batch time width"],
        depth: int,
    ) -> Float[Array, "batch time"]:
        """Divergence of MTP head `depth` from the main head, token by token; 0 where it has none.

        Args:
          parts: the parameters of the MTP head.
          main_logits: of the main head, the target: no gradient reaches it.
          hidden: the module's.
          depth: k >= 1.
        """
        logits = self._model(parts).mtp_logits(hidden, depth - 1) / self.temperature
        values = mtp.distillation(logits, main_logits, depth)
        return jnp.where(self.predictable(depth), values, 0)

    def predictable(self, depth: int) -> Bool[Array, "batch time"]:
        """Which tokens the head at this depth can predict from within their own sequence."""
        return mtp.predictable(self.segment_ids, depth)

    def score(self, params: dict[str, Any]) -> list[TokenScores]:
        """Forward pass alone: scores by the main head and every MTP head."""
        parts = partition(params)
        hidden = self.trunk(parts).hidden
        scores = [self.head(parts, hidden, 0)]
        if parts.modules:
            states = self.modules(parts, hidden)
            scores += [self.head(parts, states[k], k + 1) for k in range(states.shape[0])]
        return scores
