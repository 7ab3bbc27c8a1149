"""Each loss differentiated back to the trunk's output, where gradients meet.

Behind the trunk a loss has its own short way: output head, or MTP modules and output head. At the
trunk's output it leaves a cotangent [B, T, D]; on the way, gradients of the readout (embedding,
final norm, output head) and of the modules.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.models.partitioning import in_order
from occ.training.batch import Minibatch, take_rows
from occ.training.config import TrainConfig
from occ.training.gradient.losses import LossOutput, mtp_loss, rl_loss
from occ.training.gradient.stages import Parts, Stages, substitute
from occ.training.sharding import cut_as_parameters

HIDDEN = "hidden"  # the name of the trunk's output beside the readout's parameters in a seam


class Seam(NamedTuple):
    """One loss, differentiated back to the trunk's output.

    Attributes:
      gradient: dict of the readout's and the modules' top-level names, and `HIDDEN` for the
        cotangent [B, T, D] of the trunk's hidden state. A detached MTP loss has its modules alone.
      output: what the loss reported.
    """

    gradient: dict[str, Any]
    output: LossOutput


class Problem(NamedTuple):
    """What a step differentiates: the model on a minibatch, and how.

    Attributes:
      stages: the model on this batch.
      parts: its parameters, by stage.
      batch: the minibatch.
      config: the run's configuration.
      sequences_per_row: S, the most sequences packed in a row.
    """

    stages: Stages
    parts: Parts
    batch: Minibatch
    config: TrainConfig
    sequences_per_row: int

    def on(self, batch: Minibatch) -> Problem:
        """The same model on another batch."""
        return self._replace(stages=self.stages.on(batch), batch=batch)

    def rows(self, rows: slice) -> Problem:
        """The same on some rows of the minibatch."""
        return self.on(take_rows(self.batch, rows))


def trunk(problem: Problem) -> tuple[jax.Array, Any, Any]:
    """The trunk's output, the function that pulls a cotangent back through it, and the load."""
    parts = problem.parts

    def forward(blocks, readout):
        output = problem.stages.trunk(parts._replace(blocks=blocks, readout=readout))
        return output.hidden, output.router_load

    return jax.vjp(forward, parts.blocks, parts.readout, has_aux=True)


def all_seams(problem: Problem, hidden: jax.Array, *, attached: bool) -> list[Seam]:
    """The seams of the K+1 losses, the RL loss first."""
    main = rl_seam(problem, hidden)
    # The output head's gradient, which is whole on every device while it is added up, is cut
    # before anything else needs memory.
    hidden, gradient = in_order(hidden, main.gradient)
    main = main._replace(gradient=gradient)
    return [main, *mtp_seams(problem, hidden, attached=attached)]


def rl_seam(problem: Problem, hidden: jax.Array) -> Seam:
    """The RL loss's seam: zero on the modules."""
    stages, parts, batch, config, sequences_per_row = problem

    def loss(scores):
        return rl_loss(scores, batch, config.objective, sequences_per_row)

    by_token = config.objective.policy.by_token
    (readout, cotangent), output = stages.head_gradient(
        loss, parts, parts.readout, hidden, 0, by_token=by_token
    )
    own = jax.tree.map(jnp.zeros_like, parts.modules)
    return Seam({**cut_as_parameters(readout), **own, HIDDEN: cotangent}, output)


def mtp_seams(problem: Problem, hidden: jax.Array, *, attached: bool) -> list[Seam]:
    """One seam a head; the modules' own parameters may have a loss of their own."""
    seams = _head_seams(problem, hidden, attached=attached)
    mtp = problem.config.mtp
    if mtp.own_loss in ("same", mtp.loss):
        return seams
    own_mtp = dataclasses.replace(mtp, loss=mtp.own_loss)  # type: ignore[arg-type]
    config = dataclasses.replace(problem.config, mtp=own_mtp)
    own = _head_seams(problem._replace(config=config), hidden, attached=False)
    return [
        seam._replace(gradient={**seam.gradient, **mine.gradient})
        for seam, mine in zip(seams, own, strict=True)
    ]


def _head_seams(problem: Problem, hidden: jax.Array, *, attached: bool) -> list[Seam]:
    """One seam a head. Detached, only the modules are differentiated: nothing is left to leak."""
    stages, parts = problem.stages, problem.parts
    params = {**parts.modules, **parts.readout} if attached else parts.modules
    states, pull_modules = jax.vjp(
        lambda seam: stages.modules(substitute(parts, seam), seam.get(HIDDEN, hidden)),
        {**params, HIDDEN: hidden} if attached else params,
    )
    seams = []
    for k in range(states.shape[0]):
        (own, cotangent), output = _head_gradient(problem, params, hidden, states[k], k + 1)
        own, cotangent = in_order(cut_as_parameters(own), cotangent)
        # With sequential modules head k's gradient also reaches modules 1..k-1.
        (below,) = pull_modules(jnp.zeros_like(states).at[k].set(cotangent))
        beyond = {HIDDEN: below.pop(HIDDEN)} if attached else {}
        gradient = add_trees(own, cut_as_parameters(below))
        seams.append(Seam({**gradient, **beyond}, output))
    return seams


def _head_gradient(
    problem: Problem, params: dict[str, Any], hidden: jax.Array, state: jax.Array, depth: int
) -> tuple[tuple[dict[str, Any], jax.Array], LossOutput]:
    """Gradient of the loss of the MTP head at `depth`, on `params` and on the head's input."""
    stages, parts, batch, config, sequences_per_row = problem
    if config.mtp.loss == "distill":

        def composed(params, state):
            return _head_loss(problem, substitute(parts, params), hidden, state, depth)

        return jax.grad(composed, argnums=(0, 1), has_aux=True)(params, state)

    def loss(scores):
        return mtp_loss(scores, batch, depth, config.objective, config.mtp, sequences_per_row)

    by_token = config.mtp.loss == "ce" or config.objective.policy.by_token
    return stages.head_gradient(loss, parts, params, state, depth, by_token=by_token)


def _head_loss(
    problem: Problem, head_parts: Parts, hidden: jax.Array, state: jax.Array, depth: int
) -> tuple[jax.Array, LossOutput]:
    """The loss of the MTP head at `depth`; `head_parts` are its parameters, `state` its input."""
    stages, parts, batch, config, sequences_per_row = problem
    divergence = None
    if config.mtp.loss == "distill":
        divergence = stages.divergence(head_parts, (parts, hidden), state, depth)
    scores = stages.head(head_parts, state, depth)
    return mtp_loss(
        scores, batch, depth, config.objective, config.mtp, sequences_per_row, divergence
    )


def loss_outputs(problem: Problem, hidden: jax.Array) -> list[LossOutput]:
    """What all K+1 losses report, without any gradient."""
    stages, parts, batch, config, sequences_per_row = problem
    main = stages.head(parts, hidden, 0)
    outputs = [rl_loss(main, batch, config.objective, sequences_per_row)[1]]
    states = stages.modules(parts, hidden)
    return outputs + [
        _head_loss(problem, parts, hidden, states[k], k + 1)[1] for k in range(states.shape[0])
    ]


def scaled(seam: Seam, factor: jax.Array) -> Seam:
    """A seam whose loss is multiplied by a factor."""
    gradient = jax.tree.map(lambda x: (factor * x).astype(x.dtype), seam.gradient)
    return seam._replace(gradient=gradient)


def add_trees(left: Any, right: Any) -> Any:
    """Sum of two trees, leaf by leaf."""
    return jax.tree.map(jnp.add, left, right)
