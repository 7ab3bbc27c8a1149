"""What a train step does with the gradients of its losses, leaf by leaf in float64 numpy.

The losses and their derivatives in the logits come from `reference_losses`; the model alone is
differentiated by jax, from the logits of all heads back to the parameters.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occ.models.decoder import merge_model
from tests import reference_losses


class Memory(NamedTuple):
    """What a step remembers of those before it."""

    count: int = 0
    weights: Any = None
    gram: Any = None
    average: Any = 0.0  # of Gram matrices, and the sum of the weights in it
    average_weight: float = 0.0


class Step(NamedTuple):
    gradient: dict  # {path: array}
    metrics: dict
    memory: Memory


def _logits(graphdef, params, rest, layout):
    main, heads = merge_model(graphdef, params, rest)(*layout)
    return jnp.concatenate([main[None], heads])


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, rest, layout):
    """[K+1, B, T, V], of the main head and the modules."""
    return _logits(graphdef, params, rest, layout)


@functools.partial(jax.jit, static_argnums=0)
def pull(graphdef, params, rest, layout, cotangents):
    """Cotangents [N, K+1, B, T, V] of the logits, pulled back: parameters with a leading N."""
    _, back = jax.vjp(lambda params: _logits(graphdef, params, rest, layout), params)
    return jax.vmap(lambda cotangent: back(cotangent)[0])(cotangents)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def own(path):
    """Whether a leaf is an MTP module's own, so that no other loss reaches it."""
    return path.startswith("mtp/")


def step(config, model, batch, memory=None, prompt_columns=0):
    """The gradient and the metrics of a train step on one minibatch."""
    graphdef, params, rest = model
    memory = Memory() if memory is None else memory
    modules, mtp = config.model.mtp.num_modules, config.mtp
    layout = batch.tokens, batch.positions, batch.segment_ids
    logits = np.asarray(logits_of(graphdef, params, rest, layout), np.float64)
    losses = reference_losses.losses(logits, batch, config)
    own_kind = mtp.loss if mtp.own_loss == "same" else mtp.own_loss
    own_losses = reference_losses.losses(logits, batch, config, mtp_loss=own_kind)
    # One program for all: the RL loss, the MTP losses, and those of the modules' own leaves.
    cotangents = np.zeros((2 * modules + 1, *logits.shape))
    cotangents[0, 0] = losses[0].cotangent
    for k in range(1, len(losses)):
        cotangents[k, k] = losses[k].cotangent
        cotangents[modules + k, k] = own_losses[k].cotangent
    pulled = by_path(pull(graphdef, params, rest, layout, jnp.asarray(cotangents)))
    main, *rows = [{path: leaf[n] for path, leaf in pulled.items()} for n in range(2 * modules + 1)]
    shared_rows, own_rows = rows[:modules], rows[modules:]
    metrics = dict(losses[0].metrics) | batch_metrics(batch)
    if mtp.loss == "none":
        return Step(main, metrics | norms(main), memory)
    memory = weigh(config, losses, [main, *shared_rows], memory, prompt_columns)
    gradient = {}
    for path, g in main.items():
        gradient[path] = g.copy()
        for k in range(modules):
            m = own_rows[k][path] if own(path) else shared_rows[k][path]
            scale = 1.0 if own(path) and not mtp.scale_own else memory.weights[k]
            gradient[path] += scale * m
    for name in losses[1].metrics:
        metrics[name] = np.array([loss.metrics[name] for loss in losses[1:]])
    metrics |= norms(gradient) | calibration_metrics(memory)
    if mtp.placement == "exact":
        due = (memory.count - 1) % mtp.every == 0
        metrics |= true_metrics(gram([main, *shared_rows]), due)
    return Step(gradient, metrics, memory)


def gram(gradients):
    """Inner products over the shared leaves."""

    def product(a, b):
        return sum(float(np.sum(a[path] * b[path])) for path in a if not own(path))

    return np.array([[product(a, b) for b in gradients] for a in gradients])


def weigh(config, losses, gradients, memory, prompt_columns=0):
    """The coefficients of the modules' gradients on the shared leaves."""
    mtp, modules = config.mtp, len(losses) - 1
    if memory.count % mtp.every:
        return memory._replace(count=memory.count + 1)
    memory = memory._replace(count=memory.count + 1)
    measure = mtp.measure
    if mtp.rule in ("detach", "fixed", "replay"):  # measured for the record alone
        measure = "gradients" if mtp.placement == "exact" else "log_ratios"
    if measure == "released_unmasked":
        # The mean over all cells of responses, of the first module alone, for every module.
        main, first = (loss.log_ratio[:, prompt_columns:].ravel() for loss in losses[:2])
        ratio = sum(
            a * b / (b * b + mtp.added_eps) for a, b in zip(main, first, strict=True)
        ) / len(main)
        unknown = np.full((modules + 1, modules + 1), np.nan)
        return memory._replace(weights=np.full(modules, mtp.scale * ratio), gram=unknown)
    if measure == "log_ratios":
        cells = [loss.log_ratio.ravel() for loss in losses]
        found = np.array([[math.fsum(a * b) for b in cells] for a in cells])
    else:
        assert measure == "gradients", measure
        found = gram(gradients)
    if mtp.smoothing:
        average = mtp.smoothing * memory.average + (1 - mtp.smoothing) * found
        total = mtp.smoothing * memory.average_weight + (1 - mtp.smoothing)
        memory = memory._replace(average=average, average_weight=total)
        found = average / total
    if mtp.rule == "replay":
        series = mtp.rule_options["series"]
        turn = (memory.count - 1) // mtp.every
        weights = np.full(modules, series[min(turn, len(series) - 1)])
    elif mtp.rule in ("detach", "fixed"):
        weights = np.full(modules, 0.0 if mtp.rule == "detach" else mtp.coefficient)
    else:
        assert mtp.rule == "optimal", mtp.rule
        weights = optimal(mtp, found)
    return memory._replace(weights=weights, gram=found)


def optimal(mtp, found):
    """scale c / (v^2 + eps), or for several modules scale (V + r I)^-1 c; then the bounds."""
    c, v = found[0, 1:], found[1:, 1:]
    if len(c) == 1:
        weights = mtp.scale * c / (v[0] + mtp.added_eps)
    else:
        ridge = mtp.relative_ridge * sum(v[k, k] for k in range(len(c))) / len(c)
        weights = mtp.scale * np.linalg.inv(v + ridge * np.eye(len(c))) @ c
    if mtp.bounds is not None:
        weights = np.array([min(max(w, mtp.bounds[0]), mtp.bounds[1]) for w in weights])
    return weights


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def norms(gradient):
    def norm(wanted):
        return math.sqrt(sum(float(np.sum(g * g)) for p, g in gradient.items() if own(p) == wanted))

    return {"grad_norm/shared": norm(False), "grad_norm/own": norm(True)}


def calibration_metrics(memory):
    g = memory.gram
    modules = range(1, len(g))
    condition = math.nan
    if np.isfinite(g).all():
        condition = 1.0 if len(g) == 2 else np.linalg.cond(g[1:, 1:])
    return {
        "occ/correlation": g[0, 1:],
        "occ/perturbation": np.array([g[k, k] for k in modules]),
        "occ/cosine": np.array([g[0, k] / math.sqrt(g[0, 0] * g[k, k]) for k in modules]),
        "occ/coefficient": memory.weights,
        "occ/condition_number": condition,
        "occ/nonfinite": np.zeros(len(g) - 1),
        "occ/overflowed": np.zeros(len(g)),
    }


def true_metrics(g, due):
    modules = range(1, len(g))
    found = {
        "grad_norm/rl": math.sqrt(g[0, 0]),
        "grad_norm/mtp": np.array([math.sqrt(g[k, k]) for k in modules]),
        "true/correlation": g[0, 1:],
        "true/perturbation": np.array([g[k, k] for k in modules]),
        "true/cosine": np.array([g[0, k] / math.sqrt(g[0, 0] * g[k, k]) for k in modules]),
        "true/ratio": np.array([g[0, k] / g[k, k] for k in modules]),
    }
    # A step that keeps the coefficients of another has not looked.
    return found if due else {name: np.full_like(value, np.nan) for name, value in found.items()}


def batch_metrics(batch):
    response, advantages = np.asarray(batch.response_mask), np.asarray(batch.advantages)
    counted = [abs(advantages[cell]) for cell in np.ndindex(response.shape) if response[cell]]
    return {
        "batch/tokens": len(counted),
        "batch/mean_abs_advantage": reference_losses.mean(counted),
    }
