r"""What an auxiliary gradient is worth where the length of the step is free.

A step goes along u = sum_i w_i d^_i, d = (g, m_1, .., m_K), of gradients sampled on one minibatch.
Adam, and clipping, make its length free, so what matters of the weights is their direction. In the
guarantee of an L-smooth objective, with

    c_i  = <g, m_i>             between expected gradients      SampledGram.cross[0]
    V_ij = E <d^_i, d^_j>       of one and the same sample      SampledGram.same,

the best length along u gains in expectation R(w) / (2 L), where

    R(w) = (w'c)^2 / (w'V w),   greatest at  w = V^-1 c,
    worth = c'V^-1 c / (c_0^2 / V_00)  >= 1.

That w is also the maximiser of `sampled_lower_bound` with the weight of the main gradient left
free, at any step size: OCC's optimum holds it at 1. For K = 1, with the cosine that a minibatch
shows, rho = V_01 / sqrt(V_00 V_11), and the quotient of the signals to noise,
r = (c_1 / sqrt(V_11)) / (c_0 / sqrt(V_00)),

    worth  = 1 + (r - rho)^2 / (1 - rho^2)
    lambda = w_1 / w_0 = sqrt(V_00 / V_11) (r - rho) / (1 - rho r).

**Without noise V_0i = c_i, so w = (1, 0, .., 0) and the worth is 1**: with its length free, a step
gains by an auxiliary gradient only through noise that the main gradient does not share with it.

With V = C + N / B at batch size B, V_00 c_1 - V_01 c_0 = (N_00 c_1 - N_01 c_0) / B and

    worth - 1 = (N_00 c_1 - N_01 c_0)^2 / (c_0^2 det(B C + N))      K = 1,

which falls with B, in the end like 1 / B^2, and lambda with it like 1 / B.

Everything holds in the norm of a preconditioner P with <a, P b> for <a, b>: scale the gradients by
P^(1/2) first (`scaled`). Signs are as in `occ.theory`: gradients of losses will do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.theory.model import scaled_by
from occ.theory.sampling import SampledGram, at_batch_size

_HALVINGS = 60  # of an interval of factors of the batch size, in its logarithm
_WIDEST = 1e6


class Worth(NamedTuple):
    """The direction of the largest signal to noise, and what it is worth.

    Attributes:
      worth: R(V^-1 c) / R(e_0): so many samples is one sample worth where noise rules. It is NaN
        where the main gradient has no signal (c_0 <= 0) or V is singular.
      coefficients: float [K], lambda_k = w_k / w_0; 0 of an auxiliary gradient that is zero.
      signal_to_noise: of the main gradient alone, c_0 / (V_00 - c_0), at this batch size.
    """

    worth: jax.Array
    coefficients: jax.Array
    signal_to_noise: jax.Array


def worth(sampled: SampledGram) -> Worth:
    """What auxiliary gradients are worth, from `sampled_gram` or averages of it.

    >>> both = SampledGram(jnp.array([[9.0, 0.0], [0.0, 9.0]]), jnp.array([[1.0, 1.0], [1.0, 1.0]]))
    >>> [round(float(x), 3) for x in (worth(both).worth, worth(both).coefficients[0])]
    [2.0, 1.0]
    """
    c, V = sampled.cross[0], sampled.same
    nothing = jnp.diag(jnp.diagonal(V) == 0).astype(V.dtype)  # whose row, and c, are zero as well
    w = jnp.linalg.solve(V + nothing, c)
    defined = c[0] > 0
    main = jnp.where(defined, c[0], 1)
    best = jnp.sum(c * w) * V[0, 0] / (main * main)
    return Worth(
        jnp.where(defined, best, jnp.nan),
        w[1:] / w[0],
        jnp.where(defined, c[0] / (V[0, 0] - c[0]), jnp.nan),
    )


def relative_gain(sampled: SampledGram, coefficients: float | jax.Array) -> jax.Array:
    """R((1, lambda)) / R(e_0) - 1: what fixed coefficients gain or cost, the step's length free.

    A direction whose expected slope w'c is negative would be walked uphill; it counts as -1.

    Args:
      sampled: from `sampled_gram`.
      coefficients: float [K], or a scalar for K = 1.

    Raises:
      ValueError: coefficients of another number than K.
    """
    c, V = sampled.cross[0], sampled.same
    values = jnp.atleast_1d(jnp.asarray(coefficients, V.dtype))
    if values.shape != (V.shape[0] - 1,):
        raise ValueError(
            f"relative_gain: expected K={V.shape[0] - 1} coefficients, got shape {values.shape}."
        )
    w = jnp.concatenate([jnp.ones(1, V.dtype), values])
    slope = jnp.maximum(jnp.sum(w * c), 0)
    length = jnp.sum(w[:, None] * V * w[None, :])
    main = jnp.where(c[0] > 0, c[0], 1)
    gain = slope * slope / length * V[0, 0] / (main * main) - 1
    return jnp.where(c[0] > 0, gain, jnp.nan)


def centred(sampled: SampledGram, memory: float | jax.Array = jnp.inf) -> SampledGram:
    """With m_k - a_k in place of each m_k: auxiliary gradients as control variates.

    a_k is an average of m_k over `memory` other minibatches, so that the expected gradient is 0 and
    only noise is left: with all weights on it, a step keeps its expected direction g and sheds the
    noise that m shows. For K = 1, and with the correlation of both noises, rho,

        worth = 1 / (1 - rho^2 n / (n + 1)),    rho = N_01 / sqrt(V_00 N_11),   n = memory,

    where V_00, which contains c_0, takes the place of N_00, since R counts the signal too.

    Args:
      sampled: of (g, m_1, .., m_K); leaves float [K+1, K+1].
      memory: minibatches in the average; infinite is the expected gradient itself.
    """
    noise = sampled.same - sampled.cross
    heads = jnp.arange(len(noise)) > 0
    among = heads[:, None] & heads[None, :]
    same = jnp.where(among, noise * (1 + 1 / jnp.asarray(memory, noise.dtype)), noise)
    return SampledGram(
        same.at[0, 0].set(sampled.same[0, 0]),
        jnp.where(heads[:, None] | heads[None, :], 0, sampled.cross),
    )


def equivalent_batch(found: Worth) -> jax.Array:
    """How many times as large a minibatch the main gradient alone would need to gain as much.

        f = worth / (1 - (worth - 1) s),      s the signal to noise of the main gradient

    That is the worth itself where noise rules (s -> 0), more elsewhere, and infinite where no
    minibatch is large enough.
    """
    left = 1 - (found.worth - 1) * found.signal_to_noise
    return jnp.where(left > 0, found.worth / jnp.where(left > 0, left, 1), jnp.inf)


def critical_batch(sampled: SampledGram) -> jax.Array:
    """The factor of the batch size at which half of what noise offers (worth - 1) is gone.

    Noise offers most where it is all there is, at the smallest minibatches; far above this size
    an auxiliary gradient cannot help. At most a million.

    For K = 1 it solves det(B C + N) = 2 det N.
    """
    noise = SampledGram(sampled.same - sampled.cross, sampled.cross)
    offered = worth(noise).worth - 1

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        above = worth(at_batch_size(sampled, jnp.exp(middle))).worth - 1 > offered / 2
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    widest = jnp.log(jnp.asarray(_WIDEST, sampled.same.dtype))
    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (-widest, widest))
    return jnp.exp(low)


def scaled(parts: tuple[Any, ...], preconditioner: Any) -> tuple[Any, ...]:
    """Gradients whose inner products are those in the norm of P: times P^(1/2).

    Args:
      parts: K+1 pytrees, as of `sampled_gram`; leaves [R, ...].
      preconditioner: a pytree like one gradient, the diagonal of P > 0: for Adam
        1 / (sqrt(second moment) + eps), before the step.
    """
    roots = jax.tree.map(lambda p: jnp.sqrt(p)[None], preconditioner)
    return tuple(scaled_by(roots, part) for part in parts)


def by_group(groups: SampledGram) -> SampledGram:
    """A direction for every auxiliary gradient of every group of parameters, beside the main one.

    Where the groups (layers, for one) share the weight of the main gradient and have coefficients
    of their own.

    Args:
      groups: leaves float [G, K+1, K+1], one matrix a group.

    Returns:
      Leaves float [1 + G K, 1 + G K], a group's K directions together.
    """
    return SampledGram(*(_spread(matrices) for matrices in groups))


def _spread(matrices: jax.Array) -> jax.Array:
    blocks = jax.scipy.linalg.block_diag(*matrices[:, 1:, 1:])
    row = matrices[:, 0, 1:].reshape(-1)
    main = jnp.sum(matrices[:, 0, 0])
    return jnp.block([[main[None, None], row[None, :]], [row[:, None], blocks]])
