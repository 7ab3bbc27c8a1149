"""Each loss differentiated back to the trunk's output, where gradients meet.

Behind the trunk a loss has its own short way: output head, or MTP modules and output head. At the
trunk's output it leaves a cotangent [B, T, D]; on the way, gradients of the readout (embedding,
final norm, output head) and of the modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.models.parameters import Parts, join, substitute
from occ.models.partitioning import in_order
from occ.training.gradient.inputs import StepInputs
from occ.training.gradient.losses import (
    CROSS_ENTROPIES,
    LossOutput,
    mtp_loss,
    rl_loss,
    token_divergence,
)
from occ.training.sharding import cut_as_parameters

HIDDEN = "hidden"
"""Name of the trunk's output beside the parameters in the gradient of a head."""


class HeadGradient(NamedTuple):
    """One head's loss, differentiated back to the trunk's output.

    Attributes:
      gradient: dict of the readout's and the modules' top-level names, and `HIDDEN` for the
        cotangent [B, T, D] of the trunk's hidden state. A detached MTP loss has its modules alone.
      output: what the loss reported.
    """

    gradient: dict[str, Any]
    output: LossOutput


class Trunk(NamedTuple):
    """A forward pass through the trunk.

    Attributes:
      hidden: float [B, T, D], its output.
      pull: from a cotangent of it to the gradients on blocks and readout.
      router_load: float [L, E], tokens an expert received; None without mixture of experts.
    """

    hidden: jax.Array
    pull: Callable[[jax.Array], tuple[dict[str, Any], dict[str, Any]]]
    router_load: Any


def trunk(inputs: StepInputs) -> Trunk:
    """The trunk's output, and the way back through it."""
    parts = inputs.parts

    def forward(blocks, readout):
        output = inputs.stages.trunk(parts._replace(blocks=blocks, readout=readout))
        return output.hidden, output.router_load

    return Trunk(*jax.vjp(forward, parts.blocks, parts.readout, has_aux=True))


def head_gradients(inputs: StepInputs, hidden: jax.Array, *, attached: bool) -> list[HeadGradient]:
    """Those of the K+1 losses, the RL loss first; detached, MTP losses reach the modules alone."""
    main = rl_gradient(inputs, hidden)
    # The output head's gradient, which is whole on every device while it is added up, is cut
    # before anything else needs memory.
    hidden, gradient = in_order(hidden, main.gradient)
    main = main._replace(gradient=gradient)
    return [main, *mtp_gradients(inputs, hidden, attached=attached)]


def rl_gradient(inputs: StepInputs, hidden: jax.Array) -> HeadGradient:
    """The RL loss's gradient: zero on the modules."""
    parts = inputs.parts
    (readout, cotangent), output = inputs.stages.head_gradient(
        lambda scores: rl_loss(scores, inputs.batch, inputs.config),
        parts,
        parts.readout,
        hidden,
        0,
        by_token=inputs.config.objective.policy.by_token,
    )
    own = jax.tree.map(jnp.zeros_like, parts.modules)
    return HeadGradient({**cut_as_parameters(readout), **own, HIDDEN: cotangent}, output)


def mtp_gradients(inputs: StepInputs, hidden: jax.Array, *, attached: bool) -> list[HeadGradient]:
    """One a module; the modules' own parameters may have a loss of their own.

    Detached, only the modules are differentiated: nothing is left to leak. Both losses share one
    forward pass.
    """
    parts, own_inputs = inputs.parts, _with_own_loss(inputs)
    shared = parts.readout if attached else {}
    params = {**parts.modules, **shared}
    states, pull_modules = jax.vjp(
        lambda given: inputs.stages.modules(substitute(parts, given), given.get(HIDDEN, hidden)),
        {**params, HIDDEN: hidden} if attached else params,
    )

    def gradient(inputs, names, k):
        """On these names, and on the trunk's output if attached."""
        of_head = {name: tree for name, tree in params.items() if name in names}
        (own, cotangent), output = _head_gradient(inputs, of_head, hidden, states[k], k + 1)
        own, cotangent = in_order(cut_as_parameters(own), cotangent)
        # With sequential modules head k's gradient also reaches modules 1..k-1.
        (below,) = pull_modules(jnp.zeros_like(states).at[k].set(cotangent))
        beyond = {HIDDEN: below[HIDDEN]} if attached else {}
        below = {name: below[name] for name in of_head}
        return HeadGradient({**add_trees(own, cut_as_parameters(below)), **beyond}, output)

    heads = []
    for k in range(states.shape[0]):
        head = gradient(inputs, params if own_inputs is None else shared, k)
        if own_inputs is not None:
            mine = gradient(own_inputs, parts.modules, k).gradient
            own = {name: mine[name] for name in parts.modules}
            head = head._replace(gradient={**head.gradient, **own})
        heads.append(head)
    return heads


def _with_own_loss(inputs: StepInputs) -> StepInputs | None:
    """With the loss that the modules' own parameters learn from, if that is another."""
    mtp = inputs.config.mtp
    if mtp.own_loss in ("same", mtp.loss):
        return None
    own = dataclasses.replace(mtp, loss=mtp.own_loss)  # type: ignore[arg-type]
    return inputs._replace(config=dataclasses.replace(inputs.config, mtp=own))


def _head_gradient(
    inputs: StepInputs, params: dict[str, Any], hidden: jax.Array, state: jax.Array, depth: int
) -> tuple[tuple[dict[str, Any], jax.Array], LossOutput]:
    """Gradient of the loss of the MTP head at `depth`, on `params` and on the head's input."""
    parts, config = inputs.parts, inputs.config
    if token_divergence(config.mtp) is not None:

        def composed(params, state):
            return _head_loss(inputs, substitute(parts, params), hidden, state, depth)

        return jax.grad(composed, argnums=(0, 1), has_aux=True)(params, state)
    return inputs.stages.head_gradient(
        lambda scores: mtp_loss(scores, inputs.batch, depth, config),
        parts,
        params,
        state,
        depth,
        by_token=config.mtp.loss in CROSS_ENTROPIES or config.objective.policy.by_token,
    )


def _head_loss(
    inputs: StepInputs, head_parts: Parts, hidden: jax.Array, state: jax.Array, depth: int
) -> tuple[jax.Array, LossOutput]:
    """The loss of the MTP head at `depth`; `head_parts` are its parameters, `state` its input."""
    stages = inputs.stages
    divergence = None
    between = token_divergence(inputs.config.mtp)
    if between is not None:
        divergence = stages.divergence(head_parts, (inputs.parts, hidden), state, depth, between)
    scores = stages.head(head_parts, state, depth)
    return mtp_loss(scores, inputs.batch, depth, inputs.config, divergence)


def loss_outputs(inputs: StepInputs, hidden: jax.Array) -> list[LossOutput]:
    """What all K+1 losses report, without any gradient."""
    stages, parts = inputs.stages, inputs.parts
    main = stages.head(parts, hidden, 0)
    outputs = [rl_loss(main, inputs.batch, inputs.config)[1]]
    states = stages.modules(parts, hidden)
    return outputs + [
        _head_loss(inputs, parts, hidden, states[k], k + 1)[1] for k in range(states.shape[0])
    ]


def through_trunk(pull: Callable, gradient: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """The gradient on all parameters, from that of a head, or of a weighted sum of heads."""
    blocks, readout = pull(gradient[HIDDEN])
    return join(
        Parts(
            blocks=blocks,
            readout=add_trees(readout, {name: gradient[name] for name in parts.readout}),
            modules={name: gradient[name] for name in parts.modules},
        )
    )


def add_trees(left: Any, right: Any) -> Any:
    """Sum of two trees, leaf by leaf."""
    return jax.tree.map(jnp.add, left, right)
