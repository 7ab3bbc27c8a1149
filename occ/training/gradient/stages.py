"""The model cut into stages, so that gradients can be weighed where they meet.

    trunk:    blocks, readout           -> hidden state                    [B, T, D]
    modules:  modules, readout, hidden  -> hidden states of the K modules  [K, B, T, D]
    head k:   modules, readout, hidden  -> log-probs of the batch's tokens [B, T]

`blocks` are the trunk's layers, `modules` the MTP modules' own parameters, and `readout` what
every loss reaches directly: embedding, final norm and output head. Gradients flow back through
each stage linearly, so cotangents can be added, or weighted, where stages meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from occ.models import decoder
from occ.models.layers import first_of_the_largest
from occ.models.parameters import Parts, join, partition, substitute
from occ.models.partitioning import constrain
from occ.models.policy import Policy
from occ.objectives import divergences, mtp
from occ.training.gradient.chunks import Chunks

Aux = TypeVar("Aux")


class TokenScores(NamedTuple):
    """What a head says of the batch's tokens, in token alignment.

    Attributes:
      log_prob: float [B, T], of each token; 0 where `predictable` is False, and in prompt columns.
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
      policy: the model; each stage is told its parameters.
      batch: a `Minibatch`, or `Sequences`.
      temperature: logits are divided by it, as they were when sampling.
      logits_chunk: columns whose logits exist at one time; 0 is all of them.
      prompt_columns: leading columns whose tokens are not scored, since they hold prompts alone.
    """

    policy: Policy
    batch: Any
    temperature: float = 1.0
    logits_chunk: int = 0
    prompt_columns: int = 0

    def on(self, batch: Any) -> Stages:
        """The same model on another batch."""
        return dataclasses.replace(self, batch=batch)

    def with_frozen_head(self) -> Stages:
        """The same with an output head that is not trained gathered, as `head` does with others."""
        rest = self._gathered(self.policy.rest)
        return dataclasses.replace(self, policy=self.policy.replace(rest=rest))

    def model(self, parts: Parts) -> decoder.Decoder:
        """The model around these parameters."""
        return self.policy.replace(params=join(parts)).model

    def trunk(self, parts: Parts) -> decoder.TrunkOutput:
        """Hidden state before the final norm, and the router's load."""
        batch = self.batch
        model = self.model(parts)
        return model.trunk(batch.tokens, batch.positions, batch.segment_ids, batch.experts)

    def modules(
        self, parts: Parts, hidden: Float[Array, "batch time width"]
    ) -> Float[Array, "heads batch time width"]:
        """Hidden states of the K modules."""
        batch, model = self.batch, self.model(parts)
        return model.mtp_hidden(hidden, batch.tokens, batch.positions, batch.segment_ids)

    def head(
        self, parts: Parts, hidden: Float[Array, "batch time width"], depth: int
    ) -> TokenScores:
        """Scores of the tokens by the main head (depth 0) or MTP head `depth` >= 1."""
        parts = self._with_heads_gathered(parts)

        def score(hidden, labels):
            return self._at_source(parts, hidden, labels, depth)

        labels = mtp.labels_at_source(self.batch.tokens, depth)
        return self._aligned(self._in_chunks(score, depth, hidden, labels), depth)

    def head_gradient(
        self,
        loss: Callable[[TokenScores], tuple[jax.Array, Aux]],
        parts: Parts,
        names: Collection[str],
        hidden: Float[Array, "batch time width"],
        depth: int,
        *,
        by_token: bool,
    ) -> tuple[tuple[dict[str, Any], Float[Array, "batch time width"]], Aux]:
        """Gradient of a loss of one head's scores, on the head's parameters and its input.

        In chunks, a loss that is a sum over tokens is differentiated chunk by chunk as the scores
        come, so that no logits are computed twice. Any other loss needs all scores before it has
        a gradient, and logits a second time.

        Args:
          loss: `scores -> (loss, aux)`.
          parts: the parameters.
          names: top-level names of those that the gradient is wanted for.
          hidden: the head's input.
          depth: of the head; 0 is the main one.
          by_token: the loss is a sum over tokens, each depending on its own scores alone.

        Returns:
          The gradients on these parameters and on `hidden`, and aux.
        """
        parts = self._with_heads_gathered(parts)
        params = {name: tree for name, tree in join(parts).items() if name in names}
        if not (self._chunked and by_token):

            def composed(params, hidden):
                return loss(self.head(substitute(parts, params), hidden, depth))

            return jax.grad(composed, argnums=(0, 1), has_aux=True)(params, hidden)
        chunks = self._chunks(depth)
        labels = chunks.cut(mtp.labels_at_source(self.batch.tokens, depth))

        def step(total, chunk):
            index, hidden, labels = chunk

            def of_chunk(params, hidden):
                scores = self._at_source(substitute(parts, params), hidden, labels, depth)
                placed = tuple(chunks.place(values, index) for values in scores)
                return loss(self._aligned(placed, depth))[0], scores

            (gradient, cotangent), scores = jax.grad(of_chunk, argnums=(0, 1), has_aux=True)(
                params, hidden
            )
            return jax.tree.map(jnp.add, total, gradient), (cotangent, scores)

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, (cotangents, scores) = jax.lax.scan(
            step, zeros, (jnp.arange(chunks.count), chunks.cut(hidden), labels)
        )
        _, aux = loss(self._aligned(tuple(chunks.join(values) for values in scores), depth))
        return (self._gathered(total), chunks.join(cotangents)), aux

    def _at_source(self, parts: Parts, hidden: jax.Array, labels: jax.Array, depth: int) -> Any:
        """Log-prob, entropy and most likely token, at the positions that predict."""
        logits = self._logits(parts, hidden, depth)
        return (
            mtp.log_prob_at_source(logits, labels),
            divergences.token_entropy(logits),
            first_of_the_largest(logits),
        )

    def _aligned(self, scores_at_source: Any, depth: int) -> TokenScores:
        log_prob, entropy, greedy = (mtp.align(values, depth) for values in scores_at_source)
        scored = self.scored(depth)
        return TokenScores(
            log_prob=jnp.where(scored, log_prob, 0),
            entropy=jnp.where(scored, entropy, 0),
            greedy=greedy,
        )

    def divergence(
        self,
        parts: Parts,
        main: tuple[Parts, Float[Array, "batch time width"]],
        hidden: Float[Array, "batch time width"],
        depth: int,
        between: Callable[..., jax.Array] = mtp.distillation,
    ) -> Float[Array, "batch time"]:
        """Divergence of MTP head `depth` from the main head, token by token; 0 where it has none.

        Args:
          parts: the parameters of the MTP head.
          main: parameters and hidden state of the main head, the target: no gradient reaches it.
          hidden: the module's.
          depth: k >= 1.
          between: of their logits, token by token.
        """
        parts, (main_parts, main_hidden) = self._with_heads_gathered(parts), main
        main_parts = self._with_heads_gathered(main_parts)

        def diverge(hidden, main_hidden):
            target = self._logits(main_parts, main_hidden, 0)
            return between(self._logits(parts, hidden, depth), target)

        target_hidden = jax.lax.stop_gradient(mtp.ahead(main_hidden, depth))
        values = mtp.align(self._in_chunks(diverge, depth, hidden, target_hidden), depth)
        return jnp.where(self.scored(depth), values, 0)

    def _logits(self, parts: Parts, hidden: jax.Array, depth: int) -> jax.Array:
        """Logits of the main head (depth 0) or MTP head `depth` >= 1, at their source positions."""
        model = self.model(parts)
        logits = model.logits(hidden) if depth == 0 else model.mtp_logits(hidden, depth - 1)
        return logits / self.temperature

    def _with_heads_gathered(self, parts: Parts) -> Parts:
        return Parts(*(self._gathered(part) for part in parts))

    def _gathered(self, params: dict[str, Any]) -> dict[str, Any]:
        """Output heads gathered along the axes that cut parameters, once for all chunks.

        Sums of their gradients over the chunks stay so, too: they are then added up over the
        devices once, and not for every chunk.

        Args:
          params: some top-level names; an embedding without an output head beside it is one.
        """
        if not self._chunked:
            return params
        gathered = _head_gathered(params)
        if "mtp" in params:
            gathered["mtp"] = {k: _head_gathered(tree) for k, tree in params["mtp"].items()}
        if "embedding" in params and "output_head" not in params:
            table = constrain(params["embedding"]["embedding"], "tensor")
            gathered["embedding"] = {"embedding": table}
        return gathered

    @property
    def _chunked(self) -> bool:
        return 0 < self.logits_chunk < self.batch.tokens.shape[1]

    def _chunks(self, depth: int) -> Chunks:
        """The columns that are sources of scored tokens; a single chunk unless they are cut."""
        first = max(self.prompt_columns - depth - 1, 0)
        time = self.batch.tokens.shape[1]
        return Chunks(first, time, self.logits_chunk if self._chunked else time - first)

    def _in_chunks(self, function: Callable[..., Any], depth: int, *columns: jax.Array) -> Any:
        """Applies a function of columns [B, T, ...] to those that are sources of scored tokens.

        In chunks it takes a few columns at a time. What the function needs in between, logits above
        all, exists for those columns alone: in the backward pass it is computed again. The result
        is 0 in the columns that are left out.
        """
        chunks = self._chunks(depth)
        if not self._chunked:
            values = function(*(values[:, chunks.first :] for values in columns))
            return jax.tree.map(chunks.put_back, values)
        cut = tuple(chunks.cut(values) for values in columns)
        return jax.tree.map(chunks.join, jax.lax.map(jax.checkpoint(lambda c: function(*c)), cut))

    def scored(self, depth: int) -> Bool[Array, "batch time"]:
        """Which tokens the head at this depth scores."""
        predictable = self.predictable(depth)
        if not self.prompt_columns:
            return predictable
        return predictable & (jnp.arange(self.batch.tokens.shape[1]) >= self.prompt_columns)[None]

    def predictable(self, depth: int) -> Bool[Array, "batch time"]:
        """Which tokens the head at this depth can predict from within their own sequence."""
        return mtp.predictable(self.batch.segment_ids, depth)

    def score(self, params: dict[str, Any]) -> list[TokenScores]:
        """Forward pass alone: scores by the main head and every MTP head."""
        parts = partition(params)
        hidden = self.trunk(parts).hidden
        scores = [self.head(parts, hidden, 0)]
        if parts.modules:
            states = self.modules(parts, hidden)
            scores += [self.head(parts, states[k], k + 1) for k in range(states.shape[0])]
        return scores


def _head_gathered(tree: dict[str, Any]) -> dict[str, Any]:
    """The same tree, its output head (if it has one) cut along "tensor" alone."""
    if "output_head" not in tree:
        return dict(tree)
    kernel = constrain(tree["output_head"]["kernel"], None, "tensor")
    return {**tree, "output_head": {**tree["output_head"], "kernel": kernel}}
